"""Rounds that end when enough prompts have passed: two ranks that count together, resumed once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from job import Job, layout

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

ROUND = 40
KNOBS = (
    *layout(tp=1, pp=1),
    f"--rollout.prompts_per_round={ROUND}",
    "--rollout.batch_size=4",  # a group
    "--rollout.abort_surplus=true",
    "--rollout.keep_partial=true",  # of which the local engine has none, but surplus groups stay
    "--rollout.mismatch_alarm=1e-30",
    "--policy.old_logprobs=rollout",
    "--advantage.process_weight=0",
    "--evaluate.max_prompts=4",
    "--debug.save_rollouts=true",
)


def test_a_run_that_ends_its_rounds_loses_no_prompt_and_has_none_twice(job: Job) -> None:
    job.start("train", 2, "ended", *KNOBS, "--run.steps=2")
    said = job.start("train", 2, "ended", *KNOBS, "--run.steps=3")
    steps, folder = job.metrics("ended"), job.run("ended")
    answered: list[int] = []
    for step in (1, 2, 3):
        figures, groups = steps[step], recorded(job, step)
        assert len(groups) == figures["filter/generated"]
        assert figures["filter/generated"] + figures["rollout/aborted"] == (
            ROUND * figures["rollout/rounds"]
        )
        assert figures["filter/kept"] == 8
        assert all(len(group["rollouts"]) == 4 for group in groups)
        answered += [group["prompt"]["prompt_id"] for group in groups]
    assert steps[1]["rollout/mismatch_max"] < 1e-4, "later, some tokens are of older policies"
    assert sum(steps[step]["rollout/aborted"] for step in (1, 2, 3)) > 0
    state = json.loads((folder / "checkpoints" / "step_000003" / "run.json").read_text())
    waiting = state["prompts"]["put_back"]
    assert (
        len(set(answered + waiting)) == len(answered) + len(waiting) == state["prompts"]["cursor"]
    )
    kept = {group["prompt"]["prompt_id"] for group in state["loop"]["surplus"]}
    assert kept <= set(answered)
    assert "warning: step 3: rollout/mismatch_kl is" in said
    assert steps[3]["rollout/mismatch_alarm"] == 1


def recorded(job: Job, step: int) -> list[dict[str, Any]]:
    path = job.run("ended") / "rollouts" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
