from __future__ import annotations

import io

import pytest

from megatron_prime.runtime import console as module
from megatron_prime.runtime.console import (
    LiveDisplay,
    LogDisplay,
    TimeLeft,
    mismatch_line,
    open_display,
    step_line,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_alarm_says_value_threshold_and_where_to_look():
    line = mismatch_line(7, {"rollout/mismatch_kl": 0.08123}, 0.05)
    assert line.startswith("warning: step 7: rollout/mismatch_kl is 0.0812 nats per token, above ")
    for name in ("rollout.mismatch_alarm = 0.05", "rollout/mismatch_max", "[precision.policy]"):
        assert name in line
    assert "\n" not in line


def test_step_line_has_the_headlines_in_their_order():
    metrics = {
        "time/step_s": 12.34,
        "rollout/accuracy": 0.4215,
        "prm/loss": 0.7,
        "rollout/tokens_per_s": 7123.4,
        "evaluate/accuracy": 0.98,
    }
    assert step_line(7, 100, metrics, "0:12:30 left") == (
        "step   7/100  accuracy 0.421  held out 0.980  7,123 tokens/s  12.3 s  0:12:30 left"
    )


def test_step_line_of_fine_tuning():
    metrics = {"sft/loss": 1.5, "sft/lr": 1e-5, "sft/tokens_per_s": 900.0, "time/step_s": 2.0}
    assert step_line(3, 9, metrics, "") == "step 3/9  loss 1.5000  900 tokens/s  2.0 s"


def test_step_line_of_a_stage_that_was_judged():
    metrics = {"held_out/loss": 0.5, "held_out/pair_accuracy": 0.75, "time/step_s": 2.0}
    assert step_line(3, 9, metrics | {"prm/pair_accuracy_before": 0.6}, "") == (
        "step 3/9  PRM pairs 0.60  held-out loss 0.5000  held-out pairs 0.75  2.0 s"
    )


def test_step_line_shows_what_is_not_finite():
    assert step_line(1, 2, {"rollout/accuracy": float("nan")}, "") == "step 1/2  accuracy nan"


def test_time_left_is_extrapolated_from_this_session(clock):
    left = TimeLeft(step=10, total_steps=20)  # resumed at step 10
    clock.now += 30
    assert left.after(11) == "0:04:30 left"
    clock.now += 10
    assert left.after(12) == "0:02:40 left"  # two steps in 40 s, eight to go


def test_time_left_forgets_old_steps(clock):
    left = TimeLeft(step=0, total_steps=1000)
    clock.now += 10_000  # a slow first step
    left.after(1)
    for step in range(2, 30):
        clock.now += 1
        said = left.after(step)
    assert said == "0:16:11 left"  # 971 steps of one second


def test_no_time_left_before_the_first_and_after_the_last_step(clock):
    left = TimeLeft(step=0, total_steps=2)
    clock.now += 5
    assert left.after(0) == ""
    assert left.after(2) == ""


def test_a_pipe_gets_lines_and_nothing_else():
    stream = io.StringIO()
    display = open_display(stream, 0, 10)
    assert isinstance(display, LogDisplay)
    display.phase("generate")
    display.progress("prompts", 1, 2)
    display.say("step 1/10  accuracy [0.5]")
    display.advance(1, "0:01:00 left")
    display.close()
    assert stream.getvalue() == "step 1/10  accuracy [0.5]\n"


def test_a_terminal_gets_lines_and_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    display = open_display(stream, 3, 10)
    assert isinstance(display, LiveDisplay)
    display.phase("update policy")
    display.progress("prompts in the window", 12, 32)
    display.advance(4, "0:01:00 left")
    display._bar.refresh()
    display.say("step  4/10  accuracy [0.5]")
    display.close()
    shown = stream.getvalue()
    for part in ("update policy", "12/32 prompts in the window", "4/10", "0:01:00 left"):
        assert part in shown
    assert "step  4/10  accuracy [0.5]\n" in shown
    assert "\x1b[?25h" in shown, "the cursor must come back"
