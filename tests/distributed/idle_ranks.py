"""Two ranks that generate for known times, with real checkers and a real gather.

    idle_ranks.py FOLDER

Rank 0 prints what both have measured, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_prime.protocols import Phase
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.config import ParallelSizes  # noqa: E402
from megatron_prime.planner.residency import RESIDENT  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.ledger import Limits  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.runtime.scheduler import PhaseScheduler  # noqa: E402
from megatron_prime.runtime.timeline import Timeline  # noqa: E402
from megatron_prime.types import Group, Prompt, Rollout  # noqa: E402
from megatron_prime.verify.pool import VerifierPool  # noqa: E402

# A checker that sleeps for as many seconds as the response says.
CHECKER = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    check = json.loads(line)
    time.sleep(float(check["response"]))
    print(json.dumps({"id": check["id"], "reward": 1.0}), flush=True)
"""
FULL_S, HALF_S, CHECK_S = (0.5, 1.0), (1.0, 0.4), (1.2, 0.3)  # of ranks 0 and 1
PROMPTS = [Prompt(number, (1,), "", "math", "test") for number in range(4)]


def generate(timeline: Timeline, rank: int) -> Iterator[Group]:
    """An engine of two slots: both work, then one of them."""
    first, last = PROMPTS[rank::2]
    timeline.generating(slots=2)
    time.sleep(FULL_S[rank])
    yield group(first, 0.0)
    timeline.at_work(1)
    time.sleep(HALF_S[rank])
    timeline.generated()
    yield group(last, CHECK_S[rank])


def group(prompt: Prompt, check_s: float) -> Group:
    return Group(prompt, (Rollout((2,), (0.0,), "stop", 0, str(check_s)),))


def main(folder: Path, environ: dict[str, str]) -> None:
    here = rendezvous_from(environ)
    distributed.initialize(here, ParallelSizes(), seed=0, timeout_s=60)
    ranks = distributed.WorldRanks(60)
    timeline = ranks.timeline
    script = folder / f"checker_{ranks.rank}.py"
    script.write_text(CHECKER)
    gpus = PhaseScheduler(Limits(RESIDENT), ranks.device)
    gpus.timeline = timeline
    command = [sys.executable, "-I", "-S", str(script)]
    with VerifierPool(1, 30.0, command, timeline) as pool:
        pool.verify([group(PROMPTS[0], 0.0)])  # the checker has started
        dist.barrier()
        with gpus.phase(Phase.GENERATE):
            for _ in range(2):
                ranks.gather(pool.verify(generate(timeline, ranks.rank)), PROMPTS)
    seconds = [gpus.take_seconds()] * 2
    dist.all_gather_object(seconds, seconds[0])
    if ranks.rank == 0:
        print(json.dumps(seconds), flush=True)
    distributed.destroy()


if __name__ == "__main__":
    import os

    main(Path(sys.argv[1]), dict(os.environ))
