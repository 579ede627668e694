"""The table that all benchmarks print rows of."""

from __future__ import annotations

HEAD = "| what | ours | theirs | ratio | aim | remarks |\n|---|---|---|---|---|---|"


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3g} s"


def row(what: str, ours: float, theirs: float, aim: str, remarks: str) -> None:
    """A row; the ratio says how many times faster ours is."""
    cells = [what, seconds(ours), seconds(theirs), f"{theirs / ours:.2f} ×", aim, remarks]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    print(HEAD)
