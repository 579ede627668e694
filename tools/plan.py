"""What a run will do, from its TOML file alone: no GPU, no other process.

    python tools/plan.py reshard CONFIG [--ranks N] [--ranks-per-node 8] [--section.key=value ...]
                                        [--gb-per-s 450] [--network-gb-per-s 50]
    python tools/plan.py memory CONFIG [--ranks N] [--device-gib 80] [--reserve-gib 6] [--offload]
                                       [--cpu] [--json] [--section.key=value ...]

`reshard` prints how new weights get from the trainer's ranks to the SGLang servers: bytes by the
way they take, what gathering whole tensors on every rank would take instead, and the seconds that
the given bandwidths (GB/s of one rank in one direction, inside a node and between nodes) allow.
`memory` prints the bytes of every rank and phase, whether they fit, and what would help; it needs
no torch. docs/planner.md tells what is counted and what is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from math import lcm
from pathlib import Path

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.config_file import load
from megatron_prime.planner.advice import advise
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.report import as_json, as_table
from megatron_prime.planner.residency import NEEDED, RESIDENT
from megatron_prime.validate import check


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 with the reason when there is no such plan; 2 when memory does not fit."""
    known, overrides = _parser().parse_known_args(arguments)
    try:
        config = load(known.config, overrides)
        ranks = known.ranks or lcm(config.parallel.replica, config.rollout.tensor_parallel_size)
        if ranks % config.parallel.replica:
            raise ConfigError(
                f"--ranks: found {ranks}, wanted a multiple of tensor × pipeline × context parallel"
                f" = {config.parallel.replica}"
            )
        if known.command == "memory":
            return print_memory(config, ranks, known)
        print_reshard(config, ranks, known.ranks_per_node, known.gb_per_s, known.network_gb_per_s)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    of_reshard = commands.add_parser("reshard", help="the weight sync")
    of_memory = commands.add_parser("memory", help="bytes per rank and phase")
    for command in (of_reshard, of_memory):
        command.add_argument("config", type=Path)
        command.add_argument("--ranks", type=int, help="default: the fewest that can run it")
    of_reshard.add_argument("--ranks-per-node", type=int, default=8)
    of_reshard.add_argument("--gb-per-s", type=float, default=450.0, help="inside a node")
    of_reshard.add_argument("--network-gb-per-s", type=float, default=50.0, help="between nodes")
    of_memory.add_argument("--device-gib", type=float, default=80.0, help="memory of a device")
    of_memory.add_argument("--reserve-gib", type=float, default=6.0, help="what is not counted")
    of_memory.add_argument(
        "--offload", action="store_true", help="what a phase does not use is off"
    )
    of_memory.add_argument("--cpu", action="store_true", help="plain layers and optimizer")
    of_memory.add_argument("--json", action="store_true")
    return parser


def print_memory(config: RunConfig, ranks: int, options: argparse.Namespace) -> int:
    """The memory plan; 0 if it fits, else 2."""
    machine = Machine(
        round(options.device_gib * GIB), round(options.reserve_gib * GIB), not options.cpu
    )
    table = NEEDED if options.offload else RESIDENT
    plan = make_plan(config, ranks, machine, table)
    advice = [] if plan.fits else advise(config, ranks, machine, table)
    print(json.dumps(as_json(plan, advice)) if options.json else as_table(plan, advice))
    return 0 if plan.fits else 2


def print_reshard(
    config: RunConfig, ranks: int, ranks_per_node: int, gb_per_s: float, network_gb_per_s: float
) -> None:
    """The plan of the weight sync in a few lines. Raises ConfigError when there is none."""
    from megatron_prime.runtime.compat import before_megatron_import

    before_megatron_import()
    from megatron_prime.rollout.local_engine import DTYPES
    from megatron_prime.rollout.sglang_setup import reshard_plan
    from megatron_prime.weights.traffic import Flow, model_bytes, traffic

    sizes = config.parallel
    plan = reshard_plan(config, sizes, ranks, ranks_per_node)
    found = traffic(plan, ranks_per_node)
    flows = found.ranks
    whole = model_bytes(plan.shape, DTYPES[config.precision.policy.dtype].itemsize)

    def largest(of: Callable[[Flow], int]) -> str:
        return gigabytes(max(map(of, flows)))

    print(f"trainer: TP {sizes.tp} × PP {sizes.pp} × CP {sizes.cp} × DP {ranks // sizes.replica}")
    print(f"engine:  {plan.engine.servers} SGLang servers of TP {plan.engine.tp}")
    print(f"nodes:   {-(-ranks // ranks_per_node)} of {ranks_per_node} ranks")
    print("bytes of the busiest rank in one sync:")
    print(f"  handed to its engine      {largest(lambda flow: flow.handed)}")
    print(f"  - its own                 {largest(lambda flow: flow.own)}")
    print(f"  - from its node           {largest(lambda flow: flow.near)}")
    print(f"  - from other nodes        {largest(lambda flow: flow.far)}")
    print(f"  sent inside its node      {largest(lambda flow: flow.sent_near)}")
    print(f"  sent to other nodes       {largest(lambda flow: flow.sent_far)}")
    print(f"whole tensors on every rank would be {gigabytes(whole)}")
    print(
        f"rounds: {len(plan.rounds)}; two buffers of {plan.buffer_bytes / 2**20:.0f} MiB per rank"
    )
    print(
        f"predicted: {found.seconds(gb_per_s, network_gb_per_s):.3f} s at {gb_per_s:g} GB/s inside"
        f" a node and {network_gb_per_s:g} GB/s between nodes;"
        f" {found.seconds(gb_per_s, gb_per_s):.3f} s at {gb_per_s:g} GB/s everywhere"
    )
    try:
        check(config, "train", ranks)
    except ConfigError as error:
        print("the plan stands, but the run would be refused:")
        print("\n".join(f"  {line}" for line in str(error).splitlines()))


def gigabytes(nbytes: int) -> str:
    """Powers of ten, as bandwidths are."""
    return f"{nbytes / 1e9:.3g} GB"


if __name__ == "__main__":
    sys.exit(main())
