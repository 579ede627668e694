"""The plan of a weight sync for people: bytes of the busiest rank, and the seconds they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.rollout.local_engine import DTYPES
from megatron_prime.rollout.sglang_setup import reshard_plan
from megatron_prime.validate import check
from megatron_prime.weights.traffic import Flow, model_bytes, traffic


def lines(
    config: RunConfig, ranks: int, ranks_per_node: int, gb_per_s: float, network_gb_per_s: float
) -> Iterator[str]:
    """Bytes by the way they take, what gathering whole tensors on every rank would take instead,
    and the seconds that the bandwidths (of one rank in one direction, inside a node and between
    nodes) allow. Raises ConfigError when there is no plan."""
    sizes = config.parallel
    plan = reshard_plan(config, sizes, ranks, ranks_per_node)
    found = traffic(plan, ranks_per_node)
    flows = found.ranks
    whole = model_bytes(plan.shape, DTYPES[config.precision.policy.dtype].itemsize)

    def largest(of: Callable[[Flow], int]) -> str:
        return gigabytes(max(map(of, flows)))

    yield f"trainer: TP {sizes.tp} × PP {sizes.pp} × CP {sizes.cp} × DP {ranks // sizes.replica}"
    yield f"engine:  {plan.engine.servers} SGLang servers of TP {plan.engine.tp}"
    yield f"nodes:   {-(-ranks // ranks_per_node)} of {ranks_per_node} ranks"
    yield "bytes of the busiest rank in one sync:"
    yield f"  handed to its engine      {largest(lambda flow: flow.handed)}"
    yield f"  - its own                 {largest(lambda flow: flow.own)}"
    yield f"  - from its node           {largest(lambda flow: flow.near)}"
    yield f"  - from other nodes        {largest(lambda flow: flow.far)}"
    yield f"  sent inside its node      {largest(lambda flow: flow.sent_near)}"
    yield f"  sent to other nodes       {largest(lambda flow: flow.sent_far)}"
    yield f"whole tensors on every rank would be {gigabytes(whole)}"
    yield (
        f"rounds: {len(plan.rounds)}; two buffers of {plan.buffer_bytes / 2**20:.0f} MiB per rank"
    )
    yield (
        f"predicted: {found.seconds(gb_per_s, network_gb_per_s):.3f} s at {gb_per_s:g} GB/s inside"
        f" a node and {network_gb_per_s:g} GB/s between nodes;"
        f" {found.seconds(gb_per_s, gb_per_s):.3f} s at {gb_per_s:g} GB/s everywhere"
    )
    try:
        check(config, "train", ranks)
    except ConfigError as error:
        yield "the plan stands, but the run would be refused:"
        yield from (f"  {line}" for line in str(error).splitlines())


def gigabytes(nbytes: int) -> str:
    """Powers of ten, as bandwidths are."""
    return f"{nbytes / 1e9:.3g} GB"
