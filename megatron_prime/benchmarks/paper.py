"""Tables 2 and 3 of PRIME (arXiv 2502.01456), to be printed beside one's own figures.

Greedy pass@1 in percent. The last column is what the paper prints as the average. Cells are rounded
to 0.1, so the mean of seven may be up to 0.1 from a printed average; two printed ones are further
off than that, and `mean_of` says what their cells give.
"""

from __future__ import annotations

from dataclasses import dataclass

SETS = ("aime2024", "amc", "math500", "minerva", "olympiadbench", "leetcode", "livecodebench")
ROUNDING = 0.1


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of a table."""

    method: str
    step: int | None
    cells: tuple[float, ...]  # in the order of SETS
    average: float  # as printed

    @property
    def mean(self) -> float:
        """Of the cells."""
        return sum(self.cells) / len(self.cells)

    @property
    def adds_up(self) -> bool:
        """Whether the printed average is that of the cells, up to rounding."""
        return abs(self.mean - self.average) <= ROUNDING


TABLE2 = (
    PaperRow("GPT-4o", None, (9.3, 45.8, 76.4, 36.8, 43.3, 58.9, 48.8), 45.6),
    PaperRow("Llama-3.1-70B-Inst", None, (20.0, 37.3, 65.0, 37.1, 30.5, 35.0, 34.4), 37.0),
    PaperRow("Qwen2.5-Math-7B-Inst", None, (13.3, 50.6, 79.8, 34.6, 40.7, 11.7, 11.3), 34.6),
    PaperRow("Eurus-2-7B-SFT", 0, (3.3, 30.1, 66.2, 32.7, 29.8, 21.7, 17.8), 28.8),
    PaperRow("RLOO w/ OV only", 240, (20.0, 47.0, 73.2, 36.4, 35.4, 28.3, 26.7), 36.9),
    PaperRow("PRIME", 80, (20.0, 41.0, 68.2, 38.2, 37.0, 26.7, 26.6), 36.8),
    PaperRow("PRIME", 160, (13.3, 42.2, 72.0, 37.1, 38.7, 26.7, 25.6), 36.5),
    PaperRow("PRIME", 240, (20.0, 50.6, 78.2, 39.3, 40.3, 31.1, 27.5), 41.0),
    PaperRow("PRIME", 320, (16.7, 51.8, 77.8, 39.7, 41.5, 36.1, 28.5), 41.7),
    PaperRow("PRIME", 592, (26.7, 57.8, 79.2, 38.6, 42.1, 33.3, 28.6), 43.9),
)
TABLE3 = (
    PaperRow("RLOO", 240, (20.0, 47.0, 73.2, 36.4, 35.4, 28.3, 26.7), 36.9),
    PaperRow("RLOO w/ PRIME", 240, (20.0, 50.6, 78.2, 39.3, 40.3, 31.1, 27.5), 41.0),
    PaperRow("REINFORCE", 240, (6.7, 47.0, 72.6, 36.0, 37.2, 27.2, 25.0), 36.0),
    PaperRow("REINFORCE w/ PRIME", 240, (6.7, 50.0, 76.4, 36.8, 39.1, 27.8, 27.5), 37.8),
    PaperRow("GRPO", 240, (10.0, 44.6, 73.2, 37.5, 36.6, 25.0, 25.8), 36.1),
    PaperRow("GRPO w/ PRIME", 240, (16.7, 47.0, 75.0, 34.9, 38.2, 28.9, 23.9), 37.8),
    PaperRow("PPO", 240, (10.0, 41.0, 73.6, 36.0, 36.3, 28.3, 25.7), 35.8),
    PaperRow("PRIME as value model", 240, (16.7, 44.6, 72.6, 34.6, 35.7, 27.8, 24.6), 36.6),
    PaperRow("PPO w/ PRIME", 240, (13.3, 50.6, 77.4, 37.1, 40.6, 30.0, 26.7), 39.4),
)
# Mean accuracy of 16 samples at temperature 0.3, of a later revision: AIME 2024 and AMC alone.
AVERAGE_OF_16: tuple[tuple[str, int, float, float], ...] = (
    ("Eurus-2-7B-SFT", 0, 4.4, 21.4),
    ("RLOO w/ OV", 240, 15.4, 43.8),
    ("PRIME", 240, 17.3, 49.2),
    ("PRIME", 592, 24.2, 54.5),
)
