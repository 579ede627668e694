"""The loop, run on fakes: order of stages, refill, surplus, versions, resume, failure message."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.errors import BatchNotFilled, Interrupted
from megatron_prime.loop import run
from megatron_prime.protocols import Phase, Roles
from megatron_prime.types import (
    Group,
    LoopState,
    PrmUpdate,
    Prompt,
    Rollout,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)


class Fake:
    """Plays every role and writes down what it was asked to do."""

    def __init__(self, accuracies: Sequence[float], updates: bool = True) -> None:
        self.accuracies = accuracies  # of prompt 0, 1, …, again from the start
        self.updates = updates  # whether policy updates succeed
        self.trace: list[str] = []
        self.returned: list[int] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.saved: list[LoopState] = []
        self.samplings: list[Sampling] = []
        self.recorded: dict[int, list[int]] = {}  # prompts by step
        self.next_id = 0
        self.prm_logprobs = iter(torch.linspace(-2, -1, 50))
        self.trained_on: list[TrainBatch] = []
        self.asked_to_end: Iterator[str | None] = iter([None] * 50)

    # PromptStream
    def take(self, count: int) -> list[Prompt]:
        self.next_id += count
        ids = range(self.next_id - count, self.next_id)
        return [Prompt(i, (1, 2), "4", "math", "fake") for i in ids]

    def rollouts(self, step: int, groups: Sequence[VerifiedGroup]) -> None:
        self.recorded[step] = [group.prompt.prompt_id for group in groups]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        self.returned += [prompt.prompt_id for prompt in prompts]

    # Verifier and Ranks
    def verify(self, groups: Iterable[Group]) -> list[VerifiedGroup]:
        verified = []
        for group in groups:
            samples = len(group.rollouts)
            right = round(samples * self.accuracies[group.prompt.prompt_id % len(self.accuracies)])
            rewards = (1.0,) * right + (0.0,) * (samples - right)
            verified.append(VerifiedGroup(group.prompt, group.rollouts, rewards, 0))
        return verified

    def gather(
        self, groups: Sequence[VerifiedGroup], prompts: Sequence[Prompt]
    ) -> list[VerifiedGroup]:
        assert [g.prompt for g in groups] == list(prompts)
        return list(groups)

    # Scheduler, Recorder, Checkpoints
    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self.trace.append(phase.value)
        yield

    def peak_memory(self) -> dict[str, float]:
        return {"memory/host_peak_gib": 1.0}

    def take_seconds(self) -> dict[str, float]:
        return {"time/generate_s": 2.0}

    def progress(self, note: str, done: int, total: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged[step] = metrics

    def save(self, state: LoopState) -> None:
        self.saved.append(state)

    # StopSignals
    def asked(self) -> str | None:
        return next(self.asked_to_end)


class FakeEngine:
    def __init__(self, fake: Fake) -> None:
        self.fake, self.version = fake, -1

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Group]:
        self.fake.samplings.append(sampling)
        for prompt in prompts:
            rollout = Rollout((7, 8, 9), (-1.0, -1.0, -1.0), "stop", self.version, "789")
            yield Group(prompt, (rollout,) * sampling.samples)

    def load_weights(self, weights: Any, version: int) -> None:
        self.fake.trace.append(f"load v{version}")
        self.version = version


class FakeModel:
    """Policy, PRM and reference: three constants for log-probs."""

    def __init__(self, fake: Fake, name: str, logprob: float) -> None:
        self.fake, self.name, self.logprob, self.version = fake, name, logprob, 0

    def logprobs(self, batch: RolloutBatch) -> torch.Tensor:
        self.fake.trace.append(f"{self.name} logprobs")
        return torch.full(batch.response_mask.shape, self.logprob)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def update(self, batch: ScoredBatch | TrainBatch) -> Any:
        self.fake.trace.append(f"{self.name} update")
        if isinstance(batch, TrainBatch):
            self.fake.trained_on.append(batch)
            self.version += self.fake.updates
            return {"policy/loss": 0.0}
        self.logprob += 0.5  # what it learns
        return PrmUpdate(torch.full(batch.rollouts.response_mask.shape, -0.9), {"prm/loss": 0.7})


def play(fake: Fake, state: LoopState | None = None, with_prm: bool = True, **knobs: Any) -> None:
    policy = FakeModel(fake, "policy", -1.0)
    config = RunConfig.model_validate(
        {
            "run": {"folder": "unused", "steps": 1},
            "model": {"hf": "unused"},
            "data": {"train": "unused"},
            "rollout": {"prompts_per_step": 2, "max_rounds": 3},
            "evaluate": {"every": 0},
            **knobs,
        }
    )
    start = state or LoopState()
    policy.version = start.step
    roles = Roles(
        prompts=fake,
        engine=FakeEngine(fake),
        verifier=fake,
        ranks=fake,
        policy=policy,
        prm=FakeModel(fake, "prm", -1.0) if with_prm else None,
        reference=FakeModel(fake, "reference", -1.2) if with_prm else None,
        gpus=fake,
        recorder=fake,
        checkpoints=fake,
        signals=fake,
        eval_prompts=(Prompt(99, (1,), "4", "math", "fake"),),
    )
    run(config, roles, start)


def test_a_step_follows_the_order_of_the_paper() -> None:
    fake = Fake([0.5])
    play(fake)
    assert fake.trace == [
        "sync_weights", "load v0", "evaluate",
        "generate", "score", "reference logprobs", "policy logprobs",
        "update_prm", "prm update", "prm logprobs",
        "update_policy", "policy update",
        "sync_weights", "load v1", "evaluate", "checkpoint",
    ]  # fmt: skip
    assert fake.saved == [LoopState(1)]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [("single", -0.9), ("single_strict", -1.0), ("double", -0.5)],
)
def test_rewards_come_from_the_forward_that_was_named(forward: str, expected: float) -> None:
    fake = Fake([0.5])
    play(fake, prm={"forward": forward, "measure_after": False})
    rewards = fake.trained_on[0].process_rewards
    assert rewards is not None
    torch.testing.assert_close(rewards, torch.full((8, 3), 0.05 * (expected + 1.2)))


def test_outcome_only_needs_neither_prm_nor_reference() -> None:
    fake = Fake([0.5])
    play(fake, with_prm=False, advantage={"process_weight": 0.0})
    assert fake.trained_on[0].process_rewards is None
    assert not any("prm" in entry or "reference" in entry for entry in fake.trace)
    advantages = fake.trained_on[0].advantages
    assert (advantages[:2] > 0).all()  # the two right answers of the first group
    assert (advantages[2:4] < 0).all()


def test_refills_until_full_and_returns_stale_surplus_prompts() -> None:
    fake = Fake([0.5, 1.0, 0.5, 0.5])
    play(fake)
    assert len([s for s in fake.samplings if s.temperature > 0]) == 2
    assert fake.returned == [3]
    assert fake.logged[1]["filter/generated"] == 4
    assert fake.logged[1]["rollout/accuracy"] == pytest.approx(0.625)
    assert fake.logged[1]["filter/accuracy"] == pytest.approx(0.5)


def test_surplus_of_the_same_policy_serves_the_next_step() -> None:
    fake = Fake([0.5, 1.0, 0.5, 0.5], updates=False)
    play(fake)
    assert fake.returned == []
    (state,) = fake.saved
    assert [group.prompt.prompt_id for group in state.surplus] == [3]


def test_every_round_of_every_step_samples_from_its_own_stream() -> None:
    fake = Fake([0.5, 1.0])
    play(fake, run={"folder": "unused", "steps": 3, "seed": 5})
    seeds = [s.seed for s in fake.samplings if s.temperature > 0]
    assert len(set(seeds)) == len(seeds) == 6


def test_an_unfillable_batch_says_what_to_change() -> None:
    with pytest.raises(BatchNotFilled, match=r"only 0 of 2 .* 6 too easy .*\(filter\.min_accuracy"):
        play(Fake([1.0]))


def test_a_resumed_run_repeats_nothing() -> None:
    fake = Fake([0.5])
    play(fake, LoopState(step=2), run={"folder": "unused", "steps": 3})
    assert [entry for entry in fake.trace if entry.startswith("load")] == ["load v2", "load v3"]
    assert sorted(fake.logged) == [3]


def test_mixed_versions_in_one_group_are_refused() -> None:
    old = Rollout((7,), (-1.0,), "stop", 3, "7")
    new = Rollout((7,), (-1.0,), "stop", 4, "7")
    group = VerifiedGroup(Prompt(5, (1,), "4", "math", "fake"), (old, new), (0.0, 1.0), 0)
    with pytest.raises(ValueError, match=r"prompt 5.*\[3, 4\]"):
        _ = group.policy_version


def test_the_loop_stays_readable() -> None:
    lines = Path("megatron_prime/loop.py").read_text().count("\n")
    assert lines <= 130, "the loop is the story of the algorithm on two screens"


def test_the_loop_in_the_readme_is_the_loop() -> None:
    snippet = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [line.strip() for line in snippet.splitlines() if not line.startswith("#")]
    loop = "\n".join(
        line.strip() for line in Path("megatron_prime/loop.py").read_text().split("\n")
    )
    assert "\n".join(lines) in loop


@pytest.mark.parametrize("every", [0, 2])
def test_a_signal_ends_the_run_after_the_step_which_is_saved_once(every: int) -> None:
    fake = Fake([0.5])
    fake.asked_to_end = iter([None, "SIGUSR1"])
    with pytest.raises(Interrupted, match=r"^SIGUSR1: saved step 2; "):
        play(fake, run={"folder": "unused", "steps": 5}, checkpoint={"every": every})
    assert [state.step for state in fake.saved] == [2]
    assert sorted(fake.logged) == [0, 1, 2]
