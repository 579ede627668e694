"""How far a node's clock is from rank 0's, by asking it for the time.

Rank 0 notes when it asks and when the answer comes; the other clock was read somewhere between. If
way and return take equally long, its time belongs to the middle, and it can't be wrong by more than
half of the round trip. Of several rounds the fastest is the best.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_prime.preflight.exchange import Board
from megatron_prime.preflight.facts import Clock

ROUNDS = 7


def ask(board: Board, leader: int, until: float) -> Clock | None:
    """The clock of `leader`'s node, which has to `answer`; None if it does not."""
    rounds = []
    for number in range(ROUNDS):
        asked = time.time()
        board.pin(f"ask/{leader}/{number}", "")
        said = board.read_at_once(f"answer/{leader}/{number}", until)
        if said is None:
            return None
        rounds.append((asked, float(said), time.time()))
    return best(rounds)


def answer(board: Board, leader: int, until: float) -> None:
    """Say the time whenever rank 0 asks."""
    for number in range(ROUNDS):
        if board.read_at_once(f"ask/{leader}/{number}", until) is None:
            return
        board.pin(f"answer/{leader}/{number}", repr(time.time()))


def best(rounds: Sequence[tuple[float, float, float]]) -> Clock:
    """From (asked, their time, answered), the first and last by this clock."""
    asked, theirs, answered = min(rounds, key=lambda times: times[2] - times[0])
    return Clock(theirs - (asked + answered) / 2, (answered - asked) / 2)
