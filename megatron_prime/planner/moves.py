"""Seconds of the moves between two phases: what comes to the device and what goes.

Copies to and from pinned host memory go one after the other, at PCIe's rate in one direction. Only
what was written since it came is copied out; elsewhere the copy on the host stays good. 16-bit
weights of a woken model are cast from this rank's masters (which come for that alone where the
phase has no use for them) and gathered from the other ranks. Gradients, key/value cache and the
engine's weights are dropped, and filled again by the phases themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prime.config import ModelName, RunConfig
from megatron_prime.planner.memory import MemoryPlan, RankPlan
from megatron_prime.planner.residency import KEPT, WITHOUT_MASTERS, WRITTEN, Table
from megatron_prime.planner.training import Seconds, Trainer, add

_TRAINED: tuple[ModelName, ...] = ("policy", "prm", "critic")


@dataclass(frozen=True, slots=True)
class Moves:
    """Of one run."""

    config: RunConfig
    plan: MemoryPlan
    table: Table
    policy: Trainer

    def into(self, phases: Sequence[str], number: int) -> Seconds:
        """What `phases[number]` waits for, by what the time is spent on, on the slowest rank.

        `phases` go round: before the first of them comes the last.
        """
        if self.table[phases[number - 1]] == self.table[phases[number]]:
            return {}
        found = [self._of(rank, phases, number) for rank in self.plan.ranks]
        return max(found, key=lambda seconds: sum(seconds.values()))

    def _of(self, rank: RankPlan, phases: Sequence[str], number: int) -> Seconds:
        before, after = self.table[phases[number - 1]], self.table[phases[number]]
        come, go = after - before, before - after
        of, frozen = self.config.precision.of, self.config.frozen
        copies = [m for m in _TRAINED if of(m).dtype == "fp32" or m in frozen]
        own = KEPT.union(*(WITHOUT_MASTERS[model] for model in copies))
        copied = [name for name in come if name in own]
        copied += [name for name in go & own if self._was_written(name, phases, number)]
        found: Seconds = {}
        for model in _TRAINED:
            masters, weights = f"{model}.masters", f"{model}.weights"
            if weights not in come or model in copies or weights not in rank.kept:
                continue
            if masters not in after:
                copied.append(masters)
            group = self.policy.data_parallel * self.policy.sizes.cp
            link, speed = self.policy.ring(group)
            gathered = rank.kept[weights] * (group - 1) / group / speed
            cast = rank.kept[masters] + rank.kept[weights] / group
            found = add(found, {link: gathered, "hbm": cast / self.policy.rates.hbm})
        nbytes = sum(rank.kept.get(name, 0) for name in copied)
        return add(found, {"pcie": nbytes / self.policy.rates.pcie}) if nbytes else found

    def _was_written(self, name: str, phases: Sequence[str], number: int) -> bool:
        """Since it came to the device."""
        if name.partition(".")[0] in self.config.frozen:
            return False
        for back in range(1, len(phases) + 1):
            phase = phases[number - back]
            if name not in self.table[phase]:
                return False
            if name in WRITTEN.get(phase, ()):
                return True
        return False
