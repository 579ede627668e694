"""The loop, run on fakes: order of stages, refill, surplus, versions, resume, failure message."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prime.algorithm.filtering import passes
from megatron_prime.config import FilterSection, RunConfig
from megatron_prime.data.prompts import PromptStream
from megatron_prime.errors import BatchNotFilled, Interrupted
from megatron_prime.loop import run
from megatron_prime.protocols import Phase, Roles, Tally
from megatron_prime.types import (
    EvalSet,
    Group,
    LoopState,
    OldLogprobs,
    PolicyUpdate,
    PrmUpdate,
    Prompt,
    Rollout,
    RolloutBatch,
    Sampling,
    ScoredBatch,
    TrainBatch,
    VerifiedGroup,
)
from megatron_prime.value_batch import ValueBatch

ROLLOUT = Rollout((7, 8, 9), (-1.0, -1.0, -1.0), "stop", 0, "789")


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
        self.taught: list[ValueBatch] = []  # to the critic
        self.goals: list[int] = []  # of the tallies
        self.asked_to_end: Iterator[str | None] = iter([None] * 50)
        self.steps_end_at: list[int] | None = None  # in every response

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
    def verify(self, groups: Iterable[Group], enough: Tally | None = None) -> list[VerifiedGroup]:
        verified = []
        for group in groups:
            samples = len(group.rollouts)
            right = round(samples * self.accuracies[group.prompt.prompt_id % len(self.accuracies)])
            rewards = (1.0,) * right + (0.0,) * (samples - right)
            verified.append(VerifiedGroup(group.prompt, group.rollouts, rewards, 0))
            if enough is not None:
                enough.add(verified[-1])
        return verified

    def tally(self, goal: int, window: FilterSection) -> Tally:
        self.goals.append(goal)
        return FakeTally(goal, window)

    def gather(
        self,
        groups: Sequence[VerifiedGroup],
        prompts: Sequence[Prompt],
        enough: Tally | None = None,
    ) -> list[VerifiedGroup]:
        found = {group.prompt: group for group in groups}
        assert len(found) == len(groups)
        assert found.keys() == set(prompts) or (enough is not None and enough.reached())
        return [found[prompt] for prompt in prompts if prompt in found]

    # Scheduler, Recorder, Checkpoints
    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        self.trace.append(phase.value)
        yield

    def take_memory(self) -> dict[str, float]:
        return {"memory/host_peak_gib": 1.0}

    def take_seconds(self) -> dict[str, float]:
        return {"time/generate_s": 2.0}

    def progress(self, note: str, done: int, total: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged[step] = metrics

    def save(self, state: LoopState) -> None:
        self.saved.append(state)

    # StepReader
    def step_ends(self, batch: RolloutBatch) -> torch.Tensor | None:
        if self.steps_end_at is None:
            return None
        ends = torch.zeros_like(batch.response_mask)
        ends[:, self.steps_end_at] = True
        return ends

    # StopSignals
    def asked(self) -> str | None:
        return next(self.asked_to_end)


class FakeTally:
    """Of one rank."""

    def __init__(self, goal: int, window: FilterSection) -> None:
        self.missing, self.window = goal, window

    def add(self, group: VerifiedGroup) -> None:
        self.missing -= passes(group, self.window)

    def reached(self) -> bool:
        return self.missing <= 0


class FakeEngine:
    """Answers every other prompt first, as if the others took longer."""

    def __init__(self, fake: Fake) -> None:
        self.fake, self.version = fake, -1

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None = None
    ) -> Iterator[Group]:
        self.fake.samplings.append(sampling)
        for prompt in [*prompts[::2], *prompts[1::2]]:
            if enough is not None and enough.reached():
                return
            rollout = Rollout((7, 8, 9), (-1.0, -1.0, -1.0), "stop", self.version, "789")
            yield Group(prompt, (rollout,) * sampling.samples)

    def take_metrics(self) -> dict[str, float]:
        return {"rollout/of_the_engine": 3.0}

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

    def old_logprobs(self, batch: RolloutBatch, every_row: bool = False) -> OldLogprobs:
        self.fake.trace.append(f"{self.name} old_logprobs{' of all' if every_row else ''}")
        if every_row:
            return OldLogprobs.scored(batch, torch.arange(8), torch.full((8, 3), self.logprob))
        return OldLogprobs.none(batch)

    def weights(self) -> Any:
        return None

    def update(self, batch: ScoredBatch | TrainBatch) -> Any:
        self.fake.trace.append(f"{self.name} update")
        if isinstance(batch, TrainBatch):
            self.fake.trained_on.append(batch)
            self.version += self.fake.updates
            old = torch.full(batch.advantages.shape, self.logprob)
            return PolicyUpdate(old, {"policy/loss": 0.0})
        self.logprob += 0.5  # what it learns
        return PrmUpdate(torch.full(batch.rollouts.response_mask.shape, -0.9), {"prm/loss": 0.7})


class FakeCritic:
    """Expects a quarter of everything."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def values(self, batch: RolloutBatch) -> torch.Tensor:
        self.fake.trace.append("critic values")
        return torch.full(batch.response_mask.shape, 0.25)

    def update(self, batch: ValueBatch) -> dict[str, float]:
        self.fake.trace.append("critic update")
        self.fake.taught.append(batch)
        return {"critic/loss": 0.3}


def play(
    fake: Fake,
    state: LoopState | None = None,
    with_prm: bool = True,
    prompts: PromptStream | None = None,
    eval_sets: Sequence[EvalSet] = (),
    **knobs: Any,
) -> None:
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
        prompts=prompts or fake,
        engine=FakeEngine(fake),
        verifier=fake,
        ranks=fake,
        policy=policy,
        prm=FakeModel(fake, "prm", -1.0) if with_prm else None,
        reference=FakeModel(fake, "reference", -1.2) if "reference" in config.models else None,
        critic=FakeCritic(fake) if "critic" in config.models else None,
        gpus=fake,
        recorder=fake,
        checkpoints=fake,
        signals=fake,
        steps=fake,
        eval_prompts=(Prompt(99, (1,), "4", "math", "fake"),),
        eval_sets=eval_sets,
    )
    run(config, roles, start)


def test_a_step_follows_the_order_of_the_paper() -> None:
    fake = Fake([0.5])
    play(fake)
    assert fake.trace == [
        "sync_weights", "load v0", "evaluate",
        "generate", "score", "reference logprobs", "policy old_logprobs",
        "update_prm", "prm update",
        "update_policy", "policy update",
        "sync_weights", "load v1", "evaluate", "checkpoint",
    ]  # fmt: skip
    assert fake.saved == [LoopState(1)]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [("single", -0.9), ("single_strict", -1.0), ("double", -0.5), ("frozen", -0.9)],
)
def test_rewards_come_from_the_forward_that_was_named(forward: str, expected: float) -> None:
    fake = Fake([0.5])
    play(fake, prm={"forward": forward})
    rewards = fake.trained_on[0].process_rewards
    assert rewards is not None
    torch.testing.assert_close(rewards, torch.full((8, 3), 0.05 * (expected + 1.2)))


def test_the_policy_can_be_the_reference() -> None:
    """Of all rows before the PRM learns, once, and the policy's update takes the same."""
    fake = Fake([0.5])
    play(fake, prm={"reference": "policy"})
    assert not any("reference" in entry for entry in fake.trace)
    assert [entry for entry in fake.trace if "policy" in entry and "update" not in entry] == [
        "policy old_logprobs of all"
    ]
    rewards, scored = fake.trained_on[0].process_rewards, fake.trained_on[0].scored
    assert rewards is not None
    torch.testing.assert_close(rewards, torch.full((8, 3), 0.05 * (-0.9 + 1.0)))
    assert scored.ref_logprobs is scored.old_logprobs.logprobs
    assert scored.old_logprobs.known.all()


def test_the_prm_is_measured_after_its_update_if_that_was_asked_for() -> None:
    for knobs, forwards in (({}, 0), ({"measure_after": True}, 1), ({"forward": "double"}, 1)):
        fake = Fake([0.5])
        play(fake, prm=knobs)
        assert fake.trace[fake.trace.index("prm update") :].count("prm logprobs") == forwards
        assert ("prm/pair_accuracy_after" in fake.logged[1]) == bool(forwards)


def test_benchmark_sets_are_answered_beside_the_held_out_prompts() -> None:
    """Prompts 0 and 2 are answered right, and 1 wrong; each set has its own limit."""
    asked = [Prompt(i, (1,), "4", "math", "fake") for i in range(3)]
    sets = [
        EvalSet("amc", tuple(asked[:2]), ("a", "b"), 7),
        EvalSet("mine", (asked[2],), ("c",), 9),
    ]
    without, fake = Fake([1.0, 0.0, 0.5, 0.5]), Fake([1.0, 0.0, 0.5, 0.5])
    knobs = {"filter": {"min_accuracy": 0.0, "max_accuracy": 1.0}}
    play(without, **knobs)
    play(fake, eval_sets=sets, **knobs)
    assert fake.trace == without.trace
    new = fake.logged[1].keys() - without.logged[1].keys()
    assert {name: fake.logged[1][name] for name in new if name.endswith("accuracy")} == {
        "eval/amc/accuracy": 0.5,
        "eval/mine/accuracy": 0.0,
    }
    assert {name: fake.logged[1][name] for name in without.logged[1]} == without.logged[1]
    greedy = [s for s in fake.samplings if s.temperature == 0]
    assert [(s.samples, s.max_tokens) for s in greedy] == [(1, 3072), (1, 7), (1, 9)] * 2


def test_outcome_only_needs_neither_prm_nor_reference() -> None:
    fake = Fake([0.5])
    play(fake, with_prm=False, advantage={"process_weight": 0.0})
    assert fake.trained_on[0].process_rewards is None
    assert not any("prm" in entry or "reference" in entry for entry in fake.trace)
    advantages = fake.trained_on[0].advantages
    assert (advantages[:2] > 0).all()  # the two right answers of the first group
    assert (advantages[2:4] < 0).all()


def test_the_policy_is_tied_to_a_reference_without_a_prm() -> None:
    fake = Fake([0.5])
    loss = {"kl_coefficient": 0.1}
    play(fake, with_prm=False, advantage={"process_weight": 0.0}, policy={"loss": loss})
    assert fake.trace.count("reference logprobs") == 1
    scored = fake.trained_on[0].scored
    assert scored.ref_logprobs is not None
    assert torch.equal(scored.ref_logprobs, torch.full((8, 3), -1.2))


def test_a_critic_is_asked_before_it_learns_and_the_policy_after() -> None:
    fake = Fake([0.5])
    plain = {"process_norm": "none", "whiten": False}
    play(fake, advantage={"estimator": "gae", **plain})
    start = fake.trace.index("update_prm")
    assert fake.trace[start : start + 7] == [
        "update_prm", "prm update",
        "update_critic", "critic values", "critic update",
        "update_policy", "policy update",
    ]  # fmt: skip
    (taught,), (batch,) = fake.taught, fake.trained_on
    assert batch.process_rewards is not None
    process = batch.process_rewards.flip(1).cumsum(1).flip(1)
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2)[:, None]
    torch.testing.assert_close(taught.returns, process + outcomes)
    torch.testing.assert_close(batch.advantages, process + outcomes - 0.25)
    assert torch.equal(taught.values, torch.full((8, 3), 0.25))
    assert taught.rollouts is batch.scored.rollouts
    assert fake.logged[1]["critic/loss"] == 0.3


def test_a_critic_of_the_outcome_alone() -> None:
    fake = Fake([0.5])
    options = {"estimator": "gae", "process_weight": 0.0, "whiten": False}
    play(fake, with_prm=False, advantage=options)
    outcomes = torch.tensor([1.0, 1.0, 0.0, 0.0] * 2)[:, None].expand(8, 3)
    torch.testing.assert_close(fake.taught[0].returns, outcomes)
    torch.testing.assert_close(fake.trained_on[0].advantages, outcomes - 0.25)


@pytest.mark.parametrize("estimator", ["rloo", "gae"])
def test_what_is_masked_is_neither_trained_nor_in_the_whitening(estimator: str) -> None:
    fake = Fake([0.5])
    rollouts = (replace(ROLLOUT, finish_reason="length"), *(ROLLOUT,) * 3)
    surplus = tuple(VerifiedGroup(p, rollouts, (0.0, 1.0, 0.0, 1.0), 0) for p in fake.take(2))
    play(
        fake,
        LoopState(0, surplus),
        rollout={"prompts_per_step": 2},
        filter={"truncated": "mask"},
        advantage={"estimator": estimator},
    )
    batch = fake.trained_on[0]
    learns = batch.scored.rollouts.learns
    assert learns is not None
    assert learns.tolist() == [False, True, True, True] * 2
    trained = batch.advantages[learns]
    assert trained.mean().abs() < 1e-6
    assert trained.std() == pytest.approx(1.0, abs=1e-4)
    assert fake.logged[1]["policy/advantage_std"] == pytest.approx(1.0, abs=1e-4)
    assert batch.advantages.std() != pytest.approx(1.0, abs=1e-2)


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


def test_the_engines_figures_are_logged() -> None:
    fake = Fake([0.5])
    play(fake)
    assert fake.logged[1]["rollout/of_the_engine"] == 3.0
    assert fake.logged[1]["rollout/aborted"] == 0
    assert fake.goals == [], "nobody counts unless a round may be ended"


def test_a_round_ends_when_enough_prompts_have_passed() -> None:
    """Of six prompts 0, 2, 4 come first; 2 does not pass, 0 and 4 are enough."""
    fake = Fake([0.5, 0.5, 1.0, 0.5])
    play(fake, rollout={"prompts_per_step": 2, "prompts_per_round": 6, "abort_surplus": True})
    assert fake.goals == [2]
    assert fake.recorded[1] == [0, 2, 4]
    assert fake.returned == [1, 3, 5], "in their order"
    figures = fake.logged[1]
    assert (figures["filter/generated"], figures["rollout/aborted"]) == (3, 3)
    assert figures["rollout/accuracy"] == pytest.approx(2 / 3)


def test_each_round_counts_what_is_missing_still() -> None:
    """Every second prompt is too easy: two rounds of two, then one of which half is needed."""
    fake = Fake([0.5, 1.0])
    rollout = {"prompts_per_step": 3, "prompts_per_round": 2, "abort_surplus": True}
    play(fake, rollout=rollout, policy={"mini_batch_size": 12}, prm={"mini_batch_size": 12})
    assert fake.goals == [3, 2, 1]
    assert fake.recorded[1] == [0, 1, 2, 3, 4]
    assert fake.returned == [5]


def test_a_surplus_that_fills_the_batch_still_leaves_a_round_to_be_seen() -> None:
    """Updates that fail keep the version, so a surplus of rounds far too large stays."""
    fake = Fake([0.5], updates=False)
    surplus = tuple(
        VerifiedGroup(prompt, (ROLLOUT,) * 4, (0.0, 1.0, 0.0, 1.0), 0) for prompt in fake.take(3)
    )
    rollout = {"prompts_per_step": 2, "prompts_per_round": 4, "abort_surplus": True}
    play(fake, LoopState(0, surplus), rollout=rollout)
    assert fake.goals == [1]
    assert fake.recorded[1] == [3]
    assert fake.returned == [4, 5, 6]
    assert [group.prompt.prompt_id for group in fake.saved[0].surplus] == [2, 3]


@pytest.mark.parametrize("keep_partial", [False, True])
def test_no_prompt_is_lost_or_counted_twice(keep_partial: bool) -> None:
    """Five steps on a real stream: each prompt of the epoch is recorded once or waits its turn."""
    prompts = [Prompt(i, (1, 2, i), "4", "math", "fake") for i in range(40)]
    knobs = {
        "rollout": {
            "prompts_per_step": 2,
            "prompts_per_round": 7,
            "abort_surplus": True,
            "keep_partial": keep_partial,
        },
        "policy": {"old_logprobs": "rollout"},
        "checkpoint": {"every": 1},
    }
    fake, stream = Fake([0.5, 1.0, 0.5]), PromptStream(prompts, seed=3)
    play(fake, prompts=stream, run={"folder": "unused", "steps": 5}, **knobs)
    answered = [prompt_id for step in range(1, 6) for prompt_id in fake.recorded[step]]
    assert len(set(answered)) == len(answered)
    state = stream.state_dict()
    order = [prompt.prompt_id for prompt in PromptStream(prompts, seed=3).take(state["cursor"])]
    assert sorted(answered + state["put_back"]) == sorted(order)
    assert state["put_back"] == [i for i in order if i not in answered], "and in the old order"

    # Resumed from its state after three steps, the stream and the loop do the same.
    halves = Fake([0.5, 1.0, 0.5]), Fake([0.5, 1.0, 0.5])
    first, second = PromptStream(prompts, seed=3), PromptStream(prompts, seed=3)
    play(halves[0], prompts=first, run={"folder": "unused", "steps": 3}, **knobs)
    second.load_state_dict(first.state_dict())
    (state_3,) = (state for state in halves[0].saved if state.step == 3)
    play(halves[1], state_3, prompts=second, run={"folder": "unused", "steps": 5}, **knobs)
    assert {**halves[0].recorded, **halves[1].recorded} == fake.recorded
    assert second.state_dict() == state


def test_surplus_of_an_older_policy_serves_a_run_that_mixes_them() -> None:
    """Step 1 leaves prompt 3, of version 0; step 2 trains on it and on 4 and leaves 5."""
    fake = Fake([0.5, 1.0, 0.5, 0.5, 0.5, 0.5])
    rollout = {"prompts_per_step": 2, "keep_partial": True}
    play(fake, rollout=rollout, run={"folder": "unused", "steps": 2}, checkpoint={"every": 1})
    assert fake.returned == []
    assert fake.recorded == {1: [0, 1, 2, 3], 2: [4, 5]}, "prompt 3 was not asked again"
    left = [[(g.prompt.prompt_id, g.policy_version) for g in s.surplus] for s in fake.saved]
    assert left == [[(3, 0)], [(5, 1)]]
    assert len(fake.trained_on[1].scored.rollouts.sequences) == 8


def test_a_batch_of_two_policies_is_refused_unless_it_was_asked_for() -> None:
    groups = [
        VerifiedGroup(
            Prompt(number, (1,), "4", "math", "fake"),
            (replace(ROLLOUT, policy_version=number),) * 2,
            (0.0, 1.0),
            0,
        )
        for number in (3, 4)
    ]
    with pytest.raises(ValueError, match=r"policy versions \[3, 4\] in one batch"):
        RolloutBatch.from_groups(groups)
    assert len(RolloutBatch.from_groups(groups, mixed=True).sequences) == 4


def test_rewards_of_steps_stand_where_the_reader_of_steps_says() -> None:
    """Equal rewards c of three tokens, steps of two and one: (2c, c) less its mean, in each row."""
    fake = Fake([0.5])
    fake.steps_end_at = [1]
    plain = {"process_baseline": "paper", "process_norm": "none", "whiten": False}
    play(fake, advantage=plain | {"granularity": "step", "outcome_weight": 0.0})
    (batch,) = fake.trained_on
    assert batch.process_rewards is not None
    c = batch.process_rewards[0, 0].item()
    assert c > 0
    wanted = torch.tensor([0.0, 0.0, -c / 2]).expand(8, 3)
    torch.testing.assert_close(batch.advantages, wanted)


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
