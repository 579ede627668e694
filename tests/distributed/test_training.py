"""Updates of policy and PRM in every layout against plain transformers, torch AdamW and formulae.

The reference below shares no code with the package: one process, one row at a time, the losses
written out. What the four ranks do is in training_cases.py.
"""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from launch import run_ranks
from layouts import LAYOUTS, OF_EIGHT
from matrix import cases, in_turn, selected

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

MODELS = ["tied", "untied", "qwen3"]  # with and without shared embeddings; norms of heads
ROWS, GROUP, UPDATES = 24, 4, 2
AGGREGATION = {"tied": "token_mean", "untied": "seq_mean_token_mean", "qwen3": "token_mean"}
IMPORTANCE = {"tied": "none", "untied": "sequence", "qwen3": "token"}
OLD = {"tied": "rollout", "untied": "trainer", "qwen3": "trainer"}
KL = {"tied": "k3", "untied": "k1", "qwen3": "k2"}
CLIP_HIGH = {"tied": None, "untied": 0.02, "qwen3": 0.1}
DUAL_CLIP = {"tied": 1.6, "untied": None, "qwen3": 1.15}
CAP = 1.2
COMPARED = {"tied": ["dpo", "ce_hard"], "untied": ["nca"], "qwen3": ["kto"]}  # PRM losses
CASES = cases(MODELS, [*in_turn(MODELS), ("tied", "tp2-pp1")], LAYOUTS)


def make_job() -> dict[str, Any]:
    """Ragged rollouts with outcomes and advantages, and the knobs of both updates."""
    generator = torch.Generator().manual_seed(7)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sequences = []
    for _ in range(ROWS):
        prompt, response = integer(1, 6), integer(1, 9)
        ids = torch.randint(0, 61, (prompt + response,), generator=generator)
        sequences.append((ids.tolist(), prompt))
    width = max(len(ids) - prompt for ids, prompt in sequences)
    outcomes = torch.rand(ROWS, generator=generator).round(decimals=1)
    # An epsilon far above the gradients' noise, or Adam would turn rounding into whole steps.
    common = {"eps": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.1, "warmup_steps": 2}
    return {
        "sequences": sequences,
        "group_size": GROUP,
        "outcomes": outcomes,
        "verdicts": torch.where(outcomes < 0.6, outcomes, 1.0),  # some responses are right
        "compared": COMPARED,
        "advantages": torch.randn(ROWS, width, generator=generator),
        # Of an engine that is not far from random weights over 61 tokens.
        "rollout_logprobs": -4.7 + 0.3 * torch.randn(ROWS, width, generator=generator),
        "temperature": 1.3,
        "seed": 3,
        "policy": {
            name: {
                **common,
                "lr": 2e-2,
                "clip_grad": 0.3,
                "mini_batch_size": 12,
                "micro_batch_tokens": 40,
                "old_logprobs": OLD[name],
                "loss": {
                    "clip": 0.05 if OLD[name] == "trainer" else 0.5,
                    "clip_high": CLIP_HIGH[name],
                    "dual_clip": DUAL_CLIP[name],
                    "entropy_coefficient": 0.1,
                    "kl_coefficient": 0.2,
                    "kl_estimator": KL[name],
                    "aggregation": aggregation,
                    "importance": IMPORTANCE[name],
                    "importance_cap": CAP,
                },
            }
            for name, aggregation in AGGREGATION.items()
        },
        "prm": {
            **common,
            "lr": 1e-2,
            "clip_grad": 10.0,
            "mini_batch_size": 8,
            "micro_batch_tokens": 33,
            "beta": 0.7,
        },
    }


class Reference:
    """One model trained in the most ordinary way."""

    def __init__(self, hf_dir: Path, knobs: dict[str, Any], temperature: float) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
        self.knobs, self.temperature, self.steps = knobs, temperature, 0
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=knobs["betas"],
            eps=knobs["eps"],
            weight_decay=knobs["weight_decay"],
        )

    def forward(self, ids: list[int], prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of one response's tokens."""
        logits = self.model(torch.tensor([ids])).logits[0, prompt - 1 : -1] / self.temperature
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, torch.tensor(ids[prompt:])[:, None])[:, 0], entropy

    def begin_update(self) -> None:
        self.steps += 1
        rate = self.knobs["lr"] * min(1.0, self.steps / self.knobs["warmup_steps"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.knobs["clip_grad"])
        self.optimizer.step()
        return float(norm)


def expected(hf_dir: Path, job: dict[str, Any]) -> dict[str, Any]:
    sequences, outcomes = job["sequences"], job["outcomes"].tolist()
    frozen = Reference(hf_dir, job["prm"], 1.0)
    with torch.no_grad():
        ref = [frozen.forward(*row)[0] for row in sequences]

    prm, prm_losses, prm_forward = trained_prm(hf_dir, job, ref, "ce", outcomes)
    compared = {
        loss: trained_prm(hf_dir, job, ref, loss, job["verdicts"].tolist())
        for loss in job["compared"][hf_dir.name]
    }
    policy_knobs = job["policy"][hf_dir.name]
    policy, knobs = Reference(hf_dir, policy_knobs, job["temperature"]), policy_knobs["loss"]
    with torch.no_grad():
        old = [policy.forward(*row)[0] for row in sequences]
    engine = [job["rollout_logprobs"][row, : len(old[row])] for row in range(ROWS)]
    begun = engine if policy_knobs["old_logprobs"] == "rollout" else old
    weights, figures = importance_of(old, engine, knobs["importance"])
    policy_losses = []
    for update in range(UPDATES):
        policy.begin_update()
        generator = torch.Generator().manual_seed(job["seed"] * 1_000_003 + update)
        order = torch.randperm(ROWS, generator=generator).tolist()
        for start in range(0, ROWS, policy_knobs["mini_batch_size"]):
            rows = order[start : start + policy_knobs["mini_batch_size"]]
            terms = []
            for row in rows:
                logprobs, entropy = policy.forward(*sequences[row])
                ratio = (logprobs - begun[row]).exp()
                advantage = job["advantages"][row, : len(ratio)]
                low, high = 1 - knobs["clip"], 1 + (knobs["clip_high"] or knobs["clip"])
                surrogate = torch.minimum(advantage * ratio, advantage * ratio.clamp(low, high))
                bound = (knobs["dual_clip"] or math.inf) * advantage
                surrogate = torch.where(advantage < 0, surrogate.maximum(bound), surrogate)
                surrogate = weights[row] * surrogate
                apart = logprobs - ref[row]
                divergence = {"k1": ratio * apart, "k2": apart**2 / 2}.get(
                    knobs["kl_estimator"], 1 / apart.exp() - 1 + apart
                )
                extra = knobs["kl_coefficient"] * divergence
                terms.append(extra - surrogate - knobs["entropy_coefficient"] * entropy)
            if knobs["aggregation"] == "token_mean":
                loss = torch.cat(terms).mean()
            else:
                loss = torch.stack([term.mean() for term in terms]).mean()
            policy_losses.append((float(loss.detach()), policy.step(loss)))
    return {
        "ref_logprobs": ref,
        "old_logprobs": old,
        "prm_forward": prm_forward,
        "prm_losses": prm_losses,
        "policy_losses": policy_losses,
        "importance": figures,
        "prm": prm.model.state_dict(),
        "compared": {
            name: (losses, model.model.state_dict())
            for name, (model, losses, _) in compared.items()
        },
        "policy": policy.model.state_dict(),
    }


def trained_prm(
    hf_dir: Path, job: dict[str, Any], ref: list[torch.Tensor], loss: str, outcomes: list[float]
) -> tuple[Reference, list[tuple[float, float]], list[list[torch.Tensor]]]:
    """A PRM after its updates, each step's loss and gradient norm, its training forwards."""
    prm, beta = Reference(hf_dir, job["prm"], 1.0), job["prm"]["beta"]
    steps, forwards = [], []
    for _ in range(UPDATES):
        prm.begin_update()
        seen = []
        for start in range(0, ROWS, job["prm"]["mini_batch_size"]):
            rows = range(start, start + job["prm"]["mini_batch_size"])
            rewards = {}
            for row in rows:
                logprobs, _ = prm.forward(*job["sequences"][row])
                seen.append(logprobs.detach())
                rewards[row] = beta * (logprobs - ref[row]).sum()
            total = prm_loss(loss, rewards, outcomes)
            steps.append((float(total.detach()), prm.step(total)))
        forwards.append(seen)
    return prm, steps, forwards


def prm_loss(name: str, rewards: dict[int, torch.Tensor], outcomes: list[float]) -> torch.Tensor:
    """A mini-batch's loss, through plain sigmoids, of rewards by row."""
    chance = torch.sigmoid
    pairs = [
        (rewards[a], rewards[b])
        for a, b in product(rewards, repeat=2)
        if a // GROUP == b // GROUP and outcomes[a] > outcomes[b]
    ]
    if name in ("ce", "ce_hard"):
        label = {
            row: outcomes[row] if name == "ce" else float(outcomes[row] == 1) for row in rewards
        }
        terms = [
            -(label[row] * chance(r).log() + (1 - label[row]) * (1 - chance(r)).log())
            for row, r in rewards.items()
        ]
    elif name == "dpo":
        terms = [-chance(a - b).log() for a, b in pairs]
    elif name == "nca":
        terms = [
            -chance(a).log() - 0.5 * chance(-a).log() - 0.5 * chance(-b).log() for a, b in pairs
        ]
    else:
        right = [row for row in rewards if outcomes[row] == 1]
        wrong = [row for row in rewards if outcomes[row] != 1]
        z_right, z_wrong = (
            max(0.0, sum(float(rewards[row].detach()) for row in side) / max(1, len(side)))
            for side in (right, wrong)
        )
        terms = [1 - chance(rewards[row] - z_wrong) for row in right]
        terms += [1 - chance(z_right - rewards[row]) for row in wrong]
    return torch.stack(terms).mean()


def importance_of(
    old: list[torch.Tensor], engine: list[torch.Tensor], level: str
) -> tuple[list[Any], dict[str, float]]:
    """The weight of each token of each row, and what a run shows of them."""
    if level == "none":
        return [1.0] * ROWS, {}
    ratios = [(a - b).exp() for a, b in zip(old, engine, strict=True)]
    if level == "sequence":
        ratios = [row.prod().reshape(1) for row in ratios]
    cut = [row.where(row < CAP, torch.tensor(CAP)) for row in ratios]
    mean, share = torch.cat(cut).mean(), (torch.cat(ratios) > CAP).float().mean()
    return cut, {"policy/importance_mean": float(mean), "policy/importance_truncated": float(share)}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    tiny_models.make(path)
    torch.save(make_job() | {"cases": selected(request)}, path / "job.pt")
    run_ranks(Path(__file__).with_name("training_cases.py"), 4, [path], timeout_s=400)
    return path


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: expected(folder / name, make_job()) for name in MODELS}


def only(*layouts: str) -> list[Any]:
    """Of all cases, those in `layouts`."""
    return [case for case in CASES if case.values[0][1] in layouts]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model and a layout."""
    name, layout = request.param
    return name, layout


@pytest.fixture
def name(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def layout(case: tuple[str, str]) -> str:
    return case[1]


@pytest.fixture
def found(folder: Path, name: str, layout: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}-{layout}.pt", weights_only=False)


@pytest.mark.parametrize("case", only("tp2-pp1", "tp1-pp2"))
def test_the_first_mini_batch_needs_no_scoring(folder: Path, name: str, layout: str) -> None:
    """Nothing changes by it but rounding: two forwards of one row in other packs sum apart."""
    found = torch.load(folder / f"{name}-{layout}.pt", weights_only=False)
    with_it, without = found["scoring"]["all rows"], found["scoring"]["later rows"]
    assert found["scored_rows"] == ROWS - make_job()["policy"][name]["mini_batch_size"]
    start = tiny_models_weights(folder / name)
    for tensor, value in without["weights"].items():
        torch.testing.assert_close(value, with_it["weights"][tensor], atol=1e-6, rtol=0, msg=tensor)
    assert max(float((without["weights"][n] - start[n]).abs().max()) for n in start) > 1e-3
    torch.testing.assert_close(without["old"], with_it["old"], atol=1e-5, rtol=0)
    assert without["metrics"] == pytest.approx(with_it["metrics"], rel=1e-4, abs=1e-5)


def assert_rows(found: torch.Tensor, truth: list[torch.Tensor]) -> None:
    for row, expected_row in zip(found, truth, strict=True):
        torch.testing.assert_close(row[: len(expected_row)], expected_row, atol=1e-5, rtol=0)
        assert not row[len(expected_row) :].any(), "padding must be 0"


def test_scores(found: dict[str, Any], truths: dict[str, Any], name: str) -> None:
    assert_rows(found["ref_logprobs"], truths[name]["ref_logprobs"])
    assert_rows(found["old_logprobs"], truths[name]["old_logprobs"])


@pytest.mark.parametrize("role", ["policy", "prm"])
def test_weights_after_two_updates(
    role: str, found: dict[str, Any], truths: dict[str, Any], name: str, folder: Path
) -> None:
    truth = truths[name][role]
    for tensor, value in found[role].items():
        torch.testing.assert_close(value, truth[tensor], atol=2e-5, rtol=0, msg=tensor)
    start = tiny_models_weights(folder / name)
    moved = max(float((found[role][n] - start[n]).abs().max()) for n in found[role])
    assert moved > 1e-3, "the comparison above means nothing if nothing was learnt"


def test_prm_rewards_come_from_its_training_forwards(
    found: dict[str, Any], truths: dict[str, Any], name: str
) -> None:
    for forward, truth in zip(found["prm_forward"], truths[name]["prm_forward"], strict=True):
        assert_rows(forward, truth)


@pytest.mark.parametrize("role", ["policy", "prm"])
def test_losses_and_gradient_norms(
    role: str, found: dict[str, Any], truths: dict[str, Any], name: str
) -> None:
    steps = truths[name][f"{role}_losses"]
    per_update = len(steps) // UPDATES
    for update, metrics in enumerate(found[f"{role}_metrics"]):
        part = steps[update * per_update : (update + 1) * per_update]
        loss, norm = (sum(values) / per_update for values in zip(*part, strict=True))
        assert math.isclose(metrics[f"{role}/loss"], loss, abs_tol=1e-5)
        assert math.isclose(metrics[f"{role}/grad_norm"], norm, rel_tol=1e-4)


@pytest.mark.parametrize("case", only("tp1-pp1", "tp2-pp1", "tp1-pp2"))
def test_prm_losses_that_compare_responses(
    folder: Path, truths: dict[str, Any], name: str, layout: str
) -> None:
    """A group's responses, and a mini-batch's, lie on several ranks and in several packs."""
    found = torch.load(folder / f"{name}-{layout}.pt", weights_only=False)["compared"]
    assert list(found) == COMPARED[name]
    start = tiny_models_weights(folder / name)
    for loss, (metrics, weights) in found.items():
        steps, truth = truths[name]["compared"][loss]
        for tensor, value in weights.items():
            torch.testing.assert_close(value, truth[tensor], atol=2e-5, rtol=0, msg=tensor)
        assert max(float((weights[n] - start[n]).abs().max()) for n in start) > 1e-3
        per_update = len(steps) // UPDATES
        for update, shown in enumerate(metrics):
            part = steps[update * per_update : (update + 1) * per_update]
            value, norm = (sum(values) / per_update for values in zip(*part, strict=True))
            assert shown["prm/loss"] == pytest.approx(value, abs=1e-5)
            assert shown["prm/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_importance_weights_are_shown(
    found: dict[str, Any], truths: dict[str, Any], name: str
) -> None:
    for metrics in found["policy_metrics"]:
        shown = {key: value for key, value in metrics.items() if "importance" in key}
        assert shown == pytest.approx(truths[name]["importance"], abs=1e-5)
    share = truths[name]["importance"].get("policy/importance_truncated", 0.5)
    assert 0 < share < 1, "the weights should be cut now and then"


def test_bf16_follows_fp32(
    found: dict[str, Any], truths: dict[str, Any], name: str, folder: Path
) -> None:
    start, truth = tiny_models_weights(folder / name), truths[name]["prm"]
    apart = moved = 0.0
    for tensor, value in found["bf16"].items():
        assert value.dtype == torch.bfloat16
        apart += float((value.float() - truth[tensor]).square().sum())
        moved += float((start[tensor] - truth[tensor]).square().sum())
    assert apart < 0.1 * moved, "rounding must be small beside what was learnt"
    first = [metrics["prm/loss"] for metrics in found["bf16_metrics"]]
    exact = [metrics["prm/loss"] for metrics in found["prm_metrics"]]
    assert all(math.isclose(a, b, rel_tol=0.03) for a, b in zip(first, exact, strict=True))


def test_an_infinite_gradient_stops_all_ranks_and_changes_nothing(found: dict[str, Any]) -> None:
    message, unchanged = found["broken"]
    assert "no weight was changed" in message
    assert re.search(r"^rank \d: .*(log-probs|loss|gradient) of ", message, re.MULTILINE)
    assert unchanged


def test_a_skipped_batch_is_kept_for_replay(
    found: dict[str, Any], truths: dict[str, Any], name: str
) -> None:
    skipped = found["skipped"]
    assert skipped["steps"] == [None] * 5
    assert skipped["all_skipped"].startswith("prm: all 4 mini-batches of an update were skipped")
    assert skipped["figures"] == {"prm/not_finite_steps": 1}, "of the update after that"
    assert skipped["saved"] == ["prm_update_0", "prm_update_1", "prm_update_2"], "and no more"
    assert skipped["model"] == "prm"
    wanted = [make_job()["sequences"][row] for row in (3, 1, 2, 5)]
    assert [(list(s.token_ids), s.prompt_length) for s in skipped["sequences"]] == wanted
    assert_rows(skipped["ref"], [truths[name]["ref_logprobs"][row] for row in (3, 1, 2, 5)])
    assert skipped["restored"]


def test_versions_count_updates_and_masters_are_fp32(found: dict[str, Any]) -> None:
    assert found["version"] == UPDATES
    assert found["masters"] == {torch.float32}


def tiny_models_weights(hf_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(hf_dir / "model.safetensors")


@pytest.mark.slow
def test_eight_ranks(folder: Path, truths: dict[str, dict[str, Any]]) -> None:
    run_ranks(Path(__file__).with_name("training_cases.py"), 8, [folder], timeout_s=500)
    for name, layout in product(MODELS, OF_EIGHT):
        found = torch.load(folder / f"{name}-{layout}.pt", weights_only=False)
        test_scores(found, truths, name)
        for role in ("policy", "prm"):
            test_weights_after_two_updates(role, found, truths, name, folder)
            test_losses_and_gradient_norms(role, found, truths, name)
