"""What a stage's steps leave behind, and how somebody ends them."""

from __future__ import annotations

import pytest

from megatron_prime.errors import Interrupted
from megatron_prime.stage_steps import StageSteps


class Everyone:
    """Recorder, Checkpoints and StopSignals, remembering the order of what they hear."""

    def __init__(self, stop_at=None):
        self.heard = []
        self.stop_at = stop_at

    def log(self, step, metrics):
        self.heard.append(("log", step))

    def save(self, state):
        self.heard.append(("save", state.step))

    def asked(self):
        return "SIGUSR1" if self.heard[-1] == ("log", self.stop_at) else None


def steps(everyone, done=0, every=2):
    return StageSteps(done, 5, every, 3, everyone, everyone, everyone)


def test_every_step_is_logged_and_some_are_saved_after_it():
    everyone = Everyone()
    left = steps(everyone)
    for step in left:
        left.end(step, {})
    logs = [("log", step) for step in range(1, 6)]
    assert [kind for kind in everyone.heard if kind[0] == "log"] == logs
    saves = [
        (everyone.heard[i - 1], kind) for i, kind in enumerate(everyone.heard) if kind[0] == "save"
    ]
    assert saves == [(("log", step), ("save", step)) for step in (2, 4, 5)]


def test_with_0_only_the_last_is_saved():
    everyone = Everyone()
    left = steps(everyone, every=0)
    for step in left:
        left.end(step, {})
    assert [kind for kind in everyone.heard if kind[0] == "save"] == [("save", 5)]


def test_who_asks_for_the_end_gets_a_checkpoint():
    everyone = Everyone(stop_at=3)
    left = steps(everyone)
    for step in (1, 2):
        left.end(step, {})
    with pytest.raises(Interrupted, match="SIGUSR1: saved step 3; the same command continues"):
        left.end(3, {})
    assert everyone.heard[-1] == ("save", 3)


@pytest.mark.parametrize(("done", "left"), [(0, [1, 2, 3, 4, 5]), (3, [4, 5]), (5, [])])
def test_only_what_is_left_is_done(done, left):
    assert list(steps(Everyone(), done)) == left


def test_held_out_examples_are_judged_now_and_then_and_at_the_end():
    assert [step for step in steps(Everyone()) if steps(Everyone()).judged(step)] == [3, 5]
