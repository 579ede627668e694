"""What limits a large run, from its TOML file alone: the tables of docs/scaling.md.

    python tools/scaling.py limits     CONFIG --ranks N [--gpu h100] [--section.key=value …]
    python tools/scaling.py pipeline   CONFIG --ranks N
    python tools/scaling.py generation CONFIG --ranks N
    python tools/scaling.py exchanges  CONFIG --ranks N

`limits`: a step's predicted seconds by what they wait for, and what would help. `pipeline`: the
schedule run through event by event beside the planner's closed form. `generation`: what the long
tail of response lengths costs. docs/planner.md tells what is counted and assumed; no GPU has
confirmed any of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.config_file import load
from megatron_prime.planner import scaling, tail
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB
from megatron_prime.planner.rates import Rates, rates_of
from megatron_prime.planner.seconds import rollouts_of


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason when there is no such plan."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=("limits", *TABLES))
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--gpu", default="h100")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config, rates = load(known.config, overrides), rates_of(known.gpu)
        expected = Expectations.of(config)
        if known.ranks % config.parallel.replica:
            raise ConfigError(
                f"--ranks: found {known.ranks}, wanted a multiple of tensor × pipeline × context"
                f" parallel = {config.parallel.replica}"
            )
        if known.what == "limits":
            lines = limits(known.config, overrides, known.ranks, known.gpu)
        else:
            lines = TABLES[known.what](config, known.ranks, rates, expected)
        print("\n".join(lines))
    except ValueError as error:  # ConfigErrors, and rows that no pack can hold
        print(error, file=sys.stderr)
        return 1
    return 0


def limits(path: Path, overrides: list[str], ranks: int, gpu: str) -> Iterator[str]:
    """Seconds by phase and resource; then each change, planned anew."""
    config, rates = load(path, overrides), rates_of(gpu)
    usual = Expectations.of(config)
    plan, step = scaling.prediction(config, ranks, rates, usual)
    spent = scaling.spent(step)
    yield "predicted seconds of a step, by phase and by what they wait for"
    yield f"{'':16}" + "".join(f"{name:>10}" for name in [*spent, "together"])
    for phase in step.phases:
        parts = [phase.work.get(name, 0) + phase.moves.get(name, 0) for name in spent]
        yield f"{phase.phase:16}" + "".join(f"{part:>10.2f}" for part in [*parts, phase.seconds])
    yield f"{'a step':16}" + "".join(f"{part:>10.2f}" for part in [*spent.values(), step.seconds])
    yield f"{'':16}" + "".join(f"{part / step.seconds:>10.0%}" for part in spent.values())
    yield ""
    yield f"{'what would help':46}{'step s':>8}{'tok/s/GPU':>11}{'GiB':>7}  tools/plan.py step with"
    yield _change("nothing of it", plan.peak.device, step.seconds, step.tokens_per_s_per_gpu, "")
    for one in scaling.HELP:
        try:
            changed = load(path, [*overrides, *one.knobs])
            kept = one.sampled_per_kept or usual.sampled_per_kept
            expected = Expectations.of(changed, sampled_per_kept=kept)
            rates = rates_of(gpu, one.rates)
            plan, step = scaling.prediction(changed, ranks, rates, expected)
        except ConfigError as error:
            yield f"{one.what:46}no plan: {str(error).splitlines()[0]}"
            continue
        speed = step.tokens_per_s_per_gpu
        fits = "" if plan.fits else "DOES NOT FIT "
        yield _change(one.what, plan.peak.device, step.seconds, speed, fits + one.options)


def _change(what: str, device: int, seconds: float, speed: float, how: str) -> str:
    return f"{what:46}{seconds:>8.1f}{speed:>11.0f}{device / GIB:>7.1f}  {how}".rstrip()


def pipeline(config: RunConfig, ranks: int, rates: Rates, expected: Expectations) -> Iterator[str]:
    """One update of the policy; all its mini-batches."""
    sizes = config.parallel
    yield f"one update of the policy, PP {sizes.pp}, all mini-batches, without the optimizer:"
    yield "predicted seconds, waiting beside the busiest stage's work, micro-batches and tokens"
    yield f"{'':14}" + "".join(f"{way:>33}" for way in ("closed form", "equal parts", "packs"))
    for one in scaling.updates(
        config, ranks, rates, expected, (1, 2, 4, 5) if sizes.pp > 1 else (1,)
    ):
        cells = "".join(
            f"{way.seconds:>9.2f} s {way.bubble:>6.1%}{way.micro_batches:>6}"
            f"{way.tokens / 1000:>7.0f} k"
            for way in (one.formula, one.equal, one.packs)
        )
        yield f"{'1F1B' if one.virtual == 1 else f'interleaved {one.virtual}':14}{cells}"


def generation(
    config: RunConfig, ranks: int, rates: Rates, expected: Expectations
) -> Iterator[str]:
    """Spreads and ways."""
    plan, _ = scaling.prediction(config, ranks, rates, expected)
    rollouts = rollouts_of(config, plan, rates, expected)
    yield (
        f"{'spread':>6}  {'way':10}{'per round':>10}{'seconds':>9}{'idle':>7}{'half done':>11}"
        f"{'mean response':>15}"
    )
    for one in tail.tails(rollouts):
        yield (
            f"{one.spread:>6g}  {one.way:10}{one.prompts_per_round:>10}{one.seconds:>9.1f}"
            f"{one.idle:>7.1%}{one.half:>11.0%}{one.mean_response:>15.0f}"
        )


def exchanges(config: RunConfig, ranks: int, rates: Rates, expected: Expectations) -> Iterator[str]:
    """Of one update of the policy; all mini-batches."""
    rows, sent = scaling.exchanged(config, ranks, rates, expected)
    yield "one update of the policy: MB (10^6) that a rank hands to each exchange"
    yield f"{'':26}{'ranks':>6}{'first stage':>14}{'last stage':>14}"
    for row in rows:
        cells = f"{row.first / 1e6:>14,.3f}{row.last / 1e6:>14,.3f}"
        yield f"{row.what:26}{row.ranks:>6}{cells}"
    yield "sent in rings by a rank of the first stage, and what the planner counts of it, MB"
    for group, (all_of_it, planned) in sent.items():
        if planned:
            yield f"{group:26}{'':>6}{all_of_it / 1e6:>14,.3f}{planned / 1e6:>14,.3f}"


TABLES: dict[str, Callable[[RunConfig, int, Rates, Expectations], Iterator[str]]] = {
    "pipeline": pipeline,
    "generation": generation,
    "exchanges": exchanges,
}


if __name__ == "__main__":
    sys.exit(main())
