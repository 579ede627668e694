"""What a run will do, from its TOML file alone: no GPU, no weights, no other process.

    python tools/plan.py step CONFIG [--ranks N] [--gpu h100] [--picture FILE.png] [--json]
    python tools/plan.py step CONFIG --search --ranks N [--top 10] [--json]
    python tools/plan.py reshard CONFIG [--ranks N] [--ranks-per-node 8]
                                        [--gb-per-s 450] [--network-gb-per-s 50]

`step` (or `memory`) prints the bytes of every rank and phase, whether they fit, what would help,
and the predicted seconds of each phase; it needs no torch. `--search` ranks layouts for N ranks.
`reshard` prints how new weights get from the trainer's ranks to the SGLang servers. Any knob of the
run can be replaced by --section.key=value. docs/planner.md tells what is counted and assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import lcm
from pathlib import Path

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.config_file import load
from megatron_prime.planner import report
from megatron_prime.planner.advice import advise
from megatron_prime.planner.door import machine_of, plan_or_advice
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.rates import GPUS, Rates, rates_of
from megatron_prime.planner.search import search
from megatron_prime.planner.seconds import predict


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 with the reason when there is no such plan; 2 when memory does not fit."""
    known, overrides = _parser().parse_known_args(arguments)
    try:
        if known.command == "reshard":
            return print_reshard(load(known.config, overrides), known)
        given = {"device_gib": known.device_gib, "reserve_gib": known.reserve_gib}
        memory = [f"--memory.{name}={value}" for name, value in given.items() if value is not None]
        memory += ["--memory.offload=always"] if known.offload else []
        config, rates = load(known.config, [*overrides, *memory]), rates_of(known.gpu, known.rate)
        expected = Expectations.of(
            config, known.mean_prompt, known.mean_response, known.sampled_per_kept, known.spread
        )
        on_cpu = config.memory.device_gib if known.cpu else None
        device = known.device_gib or on_cpu or rates.memory_gib
        machine = machine_of(config, round(device * GIB), not known.cpu)
        assert machine is not None, "a device's memory was given"
        show = print_search if known.search else print_step
        return show(config, machine, rates, expected, known)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", aliases=["memory"], help="bytes and seconds of each phase")
    reshard = commands.add_parser("reshard", help="the weight sync")
    for command in (step, reshard):
        command.add_argument("config", type=Path)
        command.add_argument("--ranks", type=int, help="default: the fewest that can run it")
    reshard.add_argument("--ranks-per-node", type=int, default=8)
    reshard.add_argument("--gb-per-s", type=float, default=450.0, help="inside a node")
    reshard.add_argument("--network-gb-per-s", type=float, default=50.0, help="between nodes")
    add, known = step.add_argument, ", ".join(GPUS)
    add("--gpu", default="h100", help=f"whose rates and memory: {known}")
    add("--rate", action="append", default=[], metavar="NAME=VALUE", help="another rate of it")
    add("--device-gib", type=float, help="memory of a device; default: as a run's on --gpu")
    add("--reserve-gib", type=float, help="what is not counted; default: memory.reserve_gib")
    add("--offload", action="store_true", help='as --memory.offload="always"')
    add("--cpu", action="store_true", help="plain layers and optimizer; no seconds")
    add("--mean-prompt", type=float, metavar="TOKENS", help="default: a quarter of the longest")
    add("--mean-response", type=float, metavar="TOKENS", help="default: a third of the longest")
    add("--spread", type=float, default=0.6, help="of the logarithm of lengths (default: 0.6)")
    add("--sampled-per-kept", type=float, help="prompts sampled for one that passes the filter")
    add("--search", action="store_true", help="rank layouts for --ranks")
    add("--top", type=int, default=10, help="layouts to print")
    add("--picture", type=Path, metavar="FILE.png", help="memory over the phases of a step")
    add("--json", action="store_true")
    return parser


def _ranks(config: RunConfig, given: int | None) -> int:
    ranks = given or lcm(config.parallel.replica, config.rollout.tensor_parallel_size)
    if ranks % config.parallel.replica:
        raise ConfigError(
            f"--ranks: found {ranks}, wanted a multiple of tensor × pipeline × context parallel"
            f" = {config.parallel.replica}"
        )
    return ranks


def print_step(
    config: RunConfig,
    machine: Machine,
    rates: Rates,
    expected: Expectations,
    options: argparse.Namespace,
) -> int:
    """The plan of a step; 0 if it fits, else 2."""
    ranks = _ranks(config, options.ranks)
    table, _ = plan_or_advice(config, ranks, machine)
    plan = make_plan(config, ranks, machine, table)
    advice = [] if plan.fits else advise(config, ranks, machine)
    step = predict(config, plan, table, rates, expected) if machine.on_gpu else None
    if options.picture:
        from megatron_prime.planner.picture import draw

        draw(config, plan, table, step, options.picture)
    basis = report.basis(options.gpu, rates, expected)
    found = json.dumps(report.as_json(plan, advice, step))
    print(found if options.json else report.as_table(plan, advice, step, basis))
    return 0 if plan.fits else 2


def print_search(
    config: RunConfig,
    machine: Machine,
    rates: Rates,
    expected: Expectations,
    options: argparse.Namespace,
) -> int:
    """Layouts; 0 if one fits, else 2."""
    if options.ranks is None or options.cpu:
        raise ConfigError("--search: wanted --ranks, and no --cpu: seconds are those of GPUs")
    found = search(config, options.ranks, machine, rates, expected)
    table = report.search_table(found, options.top, report.basis(options.gpu, rates, expected))
    print(json.dumps(report.search_json(found, options.top)) if options.json else table)
    return 0 if found.fitting else 2


def print_reshard(config: RunConfig, options: argparse.Namespace) -> int:
    """The plan of the weight sync. Raises ConfigError when there is none."""
    ranks = _ranks(config, options.ranks)
    from megatron_prime.runtime.compat import before_megatron_import

    before_megatron_import()
    from megatron_prime.rollout.reshard_report import lines

    speeds = options.gb_per_s, options.network_gb_per_s
    print("\n".join(lines(config, ranks, options.ranks_per_node, *speeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
