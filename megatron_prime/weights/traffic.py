"""What a reshard plan costs: bytes by the way they take, and how long that must last at least.

Nothing is measured here. The prediction adds up, round by round, the time that the busiest rank
needs for what it receives or sends at given bandwidths, each direction for itself; links of a node
and the network between nodes work at the same time. Packing, checksums and the copy into the
engine's parameters are not in it: they are memory traffic, several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron_prime.weights.names import hf_shapes
from megatron_prime.weights.plan import ReshardPlan
from megatron_prime.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes of one rank."""

    own: int = 0  # what its engine needs and it has itself
    near: int = 0  # received from ranks of its node
    far: int = 0  # received from other nodes
    sent_near: int = 0
    sent_far: int = 0

    @property
    def handed(self) -> int:
        """To its engine process."""
        return self.own + self.near + self.far

    def __add__(self, other: Flow) -> Flow:
        return Flow(
            self.own + other.own,
            self.near + other.near,
            self.far + other.far,
            self.sent_near + other.sent_near,
            self.sent_far + other.sent_far,
        )

    def seconds(self, gb_per_s: float, network_gb_per_s: float) -> float:
        """At bandwidths of a rank, in each direction: inside a node, between nodes."""
        inside, between = max(self.near, self.sent_near), max(self.far, self.sent_far)
        return max(inside / gb_per_s, between / network_gb_per_s) / 1e9


@dataclass(frozen=True, slots=True)
class Traffic:
    """All bytes of a sync."""

    rounds: tuple[tuple[Flow, ...], ...]  # [round][rank]

    @property
    def ranks(self) -> list[Flow]:
        """What each rank moves in a whole sync."""
        return [_total(flows) for flows in zip(*self.rounds, strict=True)]

    def seconds(self, gb_per_s: float, network_gb_per_s: float) -> float:
        """The busiest rank of each round, one round after the other."""
        return sum(
            max(flow.seconds(gb_per_s, network_gb_per_s) for flow in flows) for flows in self.rounds
        )


def traffic(plan: ReshardPlan, ranks_per_node: int) -> Traffic:
    """Count the messages of a plan."""
    return Traffic(
        tuple(_of_round(plan, round_, ranks_per_node) for round_ in range(len(plan.rounds)))
    )


def model_bytes(shape: ModelShape, value_bytes: int) -> int:
    """The whole checkpoint: what every rank gets when full tensors are gathered everywhere."""
    return value_bytes * sum(prod(size) for size in hf_shapes(shape).values())


def _of_round(plan: ReshardPlan, round_: int, ranks_per_node: int) -> tuple[Flow, ...]:
    flows = [Flow() for _ in range(plan.engine.world_size)]
    for message in plan.messages(round_):
        sender, receiver, nbytes = message.sender, message.receiver, message.nbytes
        if sender == receiver:
            flows[receiver] += Flow(own=nbytes)
        elif sender // ranks_per_node == receiver // ranks_per_node:
            flows[receiver] += Flow(near=nbytes)
            flows[sender] += Flow(sent_near=nbytes)
        else:
            flows[receiver] += Flow(far=nbytes)
            flows[sender] += Flow(sent_far=nbytes)
    return tuple(flows)


def _total(flows: Sequence[Flow]) -> Flow:
    return sum(flows, Flow())
