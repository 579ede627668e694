"""Decontamination: what shares its words with an evaluation problem is not trained on.

What is compared are runs of 13 words (GPT-3's length, arXiv 2005.14165, appendix C). An item is
contaminated if it has a quarter of the runs of an evaluation problem. A problem of 8 to 12 words
is one run; a shorter one must be the item's whole text.

A single common run would condemn every contest problem for a phrase that belongs to none ("where m
and n are relatively prime positive integers, find m plus n"). That is why it takes a quarter, which
a copy with a few changed words still has; and a run found in three or more different evaluation
problems is ignored.

In memory: 12 bytes for each run of words of the evaluation files, whatever is prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prime.data.rows import Row, RowError, read_rows
from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.prepare.text import digest, normal_form, shorten, words

SHORTEST = 8  # words; a shorter problem must be the whole text
PHRASE = 3  # a run in so many different problems belongs to none
_FIELDS = ("problem", "question", "prompt", "instruction", "messages", "question_content")
_BASE = np.uint64(0x9E3779B97F4A7C15)

Keys = NDArray[np.uint64]


class Evaluation:
    """The problems of the evaluation files, to be held against items."""

    def __init__(self, paths: Sequence[Path], length: int = 13, share: float = 0.25) -> None:
        """`length`: words of a run; `share`: of a problem's runs, 0 for any single one.

        Raises DataError for files without readable problems.
        """
        self._length, self._share = length, share
        self._places: list[str] = []
        self._whole: dict[int, int] = {}  # key of the words → problem
        self.problems = {path.name: 0 for path in paths}  # how many each file has
        self.hit: dict[str, set[str]] = {path.name: set() for path in paths}
        runs: dict[int, list[tuple[Keys, int]]] = {}
        for path in paths:
            texts = read_rows(path, lambda number, row: (number, problem_text(row)))
            self.problems[path.name] = len(texts)
            for number, text in texts:
                self._read(f"{path.name} row {number}", text, runs)
        self.phrases = 0  # runs that were ignored
        indices = {size: self._index(found) for size, found in sorted(runs.items())}
        self._runs = {size: index for size, index in indices.items() if len(index[0])}
        self._sizes = np.zeros(len(self._places), np.int64)  # runs of each problem
        for _, owners in self._runs.values():
            self._sizes += np.bincount(owners, minlength=len(self._places))

    def check(self, item: Item) -> Item | Dropped:
        """The item, or the evaluation problem that it contains, and the words they share."""
        if not self._places:
            return item
        spoken = words(item.text)
        problem = self._whole.get(_whole_key(item.text))
        if problem is not None:
            return self._found(item, problem, "the whole text")
        keys = np.array([_word_key(word) for word in spoken], np.uint64)
        for size, (known, owners) in self._runs.items():
            grams, where = np.unique(run_keys(keys, size), return_index=True)
            slots = np.searchsorted(known, grams)
            slots[slots == len(known)] = 0
            hits = known[slots] == grams
            if not hits.any():
                continue
            problems, counts = np.unique(owners[slots[hits]], return_counts=True)
            shares = counts / self._sizes[problems]
            best = int(np.argmax(shares))
            if shares[best] >= self._share:
                mine = hits & (owners[slots] == problems[best])
                first = int(where[mine].min())
                shared = " ".join(spoken[first : first + size])
                return self._found(item, int(problems[best]), f"{shares[best]:.0%}, as “{shared}”")
        return item

    def _found(self, item: Item, problem: int, shared: str) -> Dropped:
        place = self._places[problem]
        self.hit[place.rpartition(" row ")[0]].add(place)
        return drop(item, "contaminated", f"shares with {place}: {shared}")

    def _read(self, place: str, text: str, runs: dict[int, list[tuple[Keys, int]]]) -> None:
        """Take in a problem, unless another of the same words is known."""
        key, problem = _whole_key(text), len(self._places)
        spoken = words(text)
        self._places.append(place)
        if key in self._whole:
            return
        self._whole[key] = problem
        size = min(self._length, len(spoken))
        if size >= SHORTEST:
            keys = np.array([_word_key(word) for word in spoken], np.uint64)
            runs.setdefault(size, []).append((np.unique(run_keys(keys, size)), problem))

    def _index(self, found: list[tuple[Keys, int]]) -> tuple[Keys, NDArray[np.int32]]:
        """Sorted keys without phrases, and the first problem that has each."""
        keys = np.concatenate([run for run, _ in found])
        owners = np.concatenate([np.full(len(run), i, np.int32) for run, i in found])
        unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
        own = counts < PHRASE
        self.phrases += int((~own).sum())
        return unique[own], owners[first[own]]


def problem_text(row: Row) -> str:
    """What an evaluation row asks; RowError if none of the usual fields has a text."""
    for name in _FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list):  # messages
            asked = [m["content"] for m in value if isinstance(m, dict) and m.get("role") == "user"]
            if asked and all(isinstance(text, str) for text in asked):
                return "\n".join(asked)
    raise RowError(f"found the fields {shorten(str(sorted(row)))}, wanted one of {_FIELDS}")


def run_keys(keys: Keys, size: int) -> Keys:
    """A key for each run of `size` words; none if there are fewer words."""
    count = max(len(keys) - size + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total = total * _BASE + keys[offset : offset + count]
    return total


def _whole_key(text: str) -> int:
    """Equal for texts that differ in layout alone, or in punctuation if they are long enough."""
    spoken = words(text)
    return digest(" ".join(spoken) if len(spoken) >= SHORTEST else normal_form(text))


@lru_cache(maxsize=1 << 16)
def _word_key(word: str) -> int:
    return digest(word)
