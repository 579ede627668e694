"""What the ranks of test_residence.py do: train two twins, one of which leaves after every step.

`python -m torch.distributed.run --nproc-per-node=4 residence_cases.py FOLDER`
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from layouts import LAYOUTS, MOVING, megatron_options  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_prime.config import ParallelSizes, PolicySection, PrecisionOptions  # noqa: E402
from megatron_prime.models import training  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.buffers import buffers_of, masters, moments  # noqa: E402
from megatron_prime.models.engine import Forward  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.mover import Mover  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import TokenSequence  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402

TIMEOUT_S = 120
STEPS = 3
CPU = torch.device("cpu")


def main(folder: Path) -> None:
    distributed.initialize(rendezvous_from(os.environ), ParallelSizes(), 1, TIMEOUT_S)
    found = {}
    for layout, (dtype, sharded) in MOVING.items():
        sizes = LAYOUTS[layout]
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        found[layout] = twins(folder / "tied", sizes, PrecisionOptions(dtype=dtype), sharded)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    distributed.destroy()


def engine_of(
    hf_dir: Path, sizes: ParallelSizes, precision: PrecisionOptions, sharded: bool
) -> TrainableEngine:
    """As `TrainableEngine` builds itself, on a GPU if `sharded`."""
    shape = ModelShape.from_hf(hf_dir, sizes.tp)
    chunks = build_model(shape, precision, megatron_options(sizes))
    load_hf(chunks, hf_dir, shape)
    plain = training.DistributedDataParallelConfig, training.make_optimizer
    if sharded:
        training.DistributedDataParallelConfig = lambda **options: plain[0](
            **{**options, "use_distributed_optimizer": True}
        )
        training.make_optimizer = lambda chunks, knobs, precision, _: plain[1](
            chunks, knobs, precision, True
        )
    try:
        knobs = PolicySection(lr=1e-2, micro_batch_tokens=32)
        return TrainableEngine(chunks, shape, knobs, 1.0, STEPS, precision)
    finally:
        training.DistributedDataParallelConfig, training.make_optimizer = plain


def twins(
    hf_dir: Path, sizes: ParallelSizes, precision: PrecisionOptions, sharded: bool
) -> dict[str, Any]:
    """Bytes of the one that moves, by stage; whether it ever differs from the one that stays."""
    stays, moves = (engine_of(hf_dir, sizes, precision, sharded) for _ in range(2))
    mover = Mover(None, CPU)
    for buffer in buffers_of("policy", moves):
        mover.add(buffer)
    everything = frozenset(mover.buffers)
    sequences = rows()

    def loss(weight: float, forward: Forward) -> torch.Tensor:
        return weight * forward.logprobs.square().sum()

    same, held = [], {"all": [], "weights": [], "nothing": []}
    for step in range(STEPS):
        results = []
        for engine in (stays, moves):
            engine.next_rate()
            results.append(engine.train_step(sequences, range(12), partial(loss, 1.0 + step)))
        same.append(torch.equal(results[0].logprobs, results[1].logprobs))
        mover.written(everything)
        held["all"].append(mover.on_device())
        mover.switch(frozenset())
        held["nothing"].append(mover.on_device())
        same.append(states_equal(stays, moves))  # on the host, where a checkpoint finds them
        mover.switch(frozenset({"policy.weights"}))
        held["weights"].append(mover.on_device())
        same.append(weights_equal(stays, moves))
        scores = [engine.logprobs(sequences) for engine in (stays, moves)]
        same.append(torch.equal(*scores))
        mover.switch(everything)
        same += [weights_equal(stays, moves), states_equal(stays, moves)]
    pieces = {name: sum(p.nbytes for p in b.pieces) for name, b in mover.buffers.items()}
    return {"same": same, "held": held, "pieces": pieces, "moved": mover.moved}


def weights_equal(one: TrainableEngine, other: TrainableEngine) -> bool:
    pairs = zip(one.modules, other.modules, strict=True)
    return all(
        torch.equal(a, b)
        for first, second in pairs
        for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def states_equal(one: TrainableEngine, other: TrainableEngine) -> bool:
    return all(
        torch.equal(a, b)
        for of in (masters, moments)
        for a, b in zip(of(one), of(other), strict=True)
    )


def rows() -> tuple[TokenSequence, ...]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 12, (12,), generator=generator).tolist()
    return tuple(
        TokenSequence(tuple(torch.randint(0, 61, (n,), generator=generator).tolist()), 2)
        for n in lengths
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
