"""One of four trainer ranks of bench_reshard.py, and its engine's stand-in: both ways in turns.

Rank 0 prints one line of JSON. Both ways fill the same engine parameters; their checksums must
agree in the end, which proves that they did the same work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from measure import Extra, give_back_what_is_freed

from megatron_prime.config import ParallelSizes, PrecisionOptions
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.rollout.weight_sync import WeightSync  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.parent import die_with  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.weights import reshard  # noqa: E402
from megatron_prime.weights.checksum import checksum  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.handover import Handover, HandoverLayout  # noqa: E402
from megatron_prime.weights.names import hf_shapes  # noqa: E402
from megatron_prime.weights.placement import EngineLayout, TrainingLayout  # noqa: E402
from megatron_prime.weights.plan import ReshardPlan, make_plan  # noqa: E402
from megatron_prime.weights.source import LiveWeights  # noqa: E402

SIZES = ParallelSizes(tp=2, pp=2)
DTYPE = torch.float32
CPU = torch.device("cpu")
TIMEOUT_S = 120.0
WARM_UP = 2


class Engine:
    """The process beside this rank."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.wire, theirs = multiprocessing.Pipe()
        program = Path(__file__).with_name("reshard_engine.py")
        self.process = subprocess.Popen(
            [sys.executable, program, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.wire.send(description)

    def ask(self, *message: Any) -> Any:
        """Send and wait for the answer."""
        self.wire.send(message)
        return self.wire.recv()


class Usual:
    """Every full tensor on every rank, flattened into buckets that the engine slices."""

    def __init__(self, chunks: Any, shape: ModelShape, engine: Engine, bucket_bytes: int) -> None:
        self.chunks, self.shape, self.engine = chunks, shape, engine
        self.bucket_bytes = bucket_bytes
        largest = (
            max(torch.Size(size).numel() for size in hf_shapes(shape).values()) * DTYPE.itemsize
        )
        layout = HandoverLayout({}, {}, [], max(bucket_bytes, largest), TIMEOUT_S)
        self.memory = Handover.create(layout, CPU)  # opened once, too, and filled in turns
        engine.wire.send(("open", self.memory.ticket))
        self.handed = 0

    def sync(self) -> None:
        which, at, content, waiting = 0, 0, [], 0
        self.handed = 0

        def flush() -> None:
            nonlocal which, at, content, waiting
            self.engine.wire.send(("bucket", which, content))
            self.handed += at
            waiting += 1
            if waiting == 2:  # the other buffer is free when its bucket is loaded
                self.engine.wire.recv()
                waiting -= 1
            which, at, content = 1 - which, 0, []

        for name, tensor in gather_hf_tensors(self.chunks, self.shape, self.bucket_bytes):
            nbytes = tensor.numel() * tensor.dtype.itemsize
            if at + nbytes > self.memory.buffers[0].numel():
                flush()
            room = self.memory.buffers[which][at : at + nbytes].view(tensor.dtype)
            room.view(tensor.shape).copy_(tensor)
            content.append((name, tuple(tensor.shape), at))
            at += nbytes
        flush()
        for _ in range(waiting):
            self.engine.wire.recv()


class Ours:
    """WeightSync, and the loader that runs inside SGLang."""

    def __init__(self, chunks: Any, plan: ReshardPlan, engine: Engine, dtype: torch.dtype) -> None:
        self.source, self.engine = LiveWeights(chunks, plan.shape), engine
        self.servers = range(plan.engine.servers)
        self.weights = WeightSync(reshard.Reshard(plan, dist.get_rank(), dtype), CPU, TIMEOUT_S)

    def sync(self) -> None:
        self.engine.wire.send(("direct", self.weights.begin()))
        problem = self.weights.run(
            self.source, self.servers, lambda: self.engine.process.poll() is None
        )
        assert problem is None, problem


class WithoutChecksums:
    """The same, unproved."""

    def __init__(self, ours: Ours) -> None:
        self.ours = ours

    def sync(self) -> None:
        self.ours.engine.wire.send(("proof", False))
        reshard.checksum = lambda _: torch.zeros((), dtype=torch.int64)
        self.ours.sync()
        reshard.checksum = checksum
        self.ours.engine.wire.send(("proof", True))


def peak(engine: Engine, prepare: Callable[[], Any]) -> tuple[Any, int]:
    """Set a way up, sync twice; the extra bytes at the peak, of the rank and of its engine."""
    engine.ask("measure")
    dist.barrier()
    extra = Extra()
    way = prepare()
    for _ in range(WARM_UP):
        way.sync()
    dist.barrier()
    return way, extra.peak_bytes() + engine.ask("extra")


def alternate(repeat: int, ways: list[Any]) -> list[float]:
    """Median seconds of each until the slowest rank's engine has the weights, turn by turn."""
    for way in ways:
        way.sync()
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeat):
        for way, kept in zip(ways, seconds, strict=True):
            dist.barrier()
            started = time.perf_counter()
            way.sync()
            dist.barrier()
            kept.append(time.perf_counter() - started)
    return [median(kept) for kept in seconds]


def received(plan: ReshardPlan, rank: int) -> tuple[int, int]:
    """Bytes of our messages to a rank from others, and of all that its engine is handed."""
    messages = [m for i in range(len(plan.rounds)) for m in plan.incoming(i, rank)]
    return (
        sum(m.nbytes for m in messages if m.sender != rank),
        sum(m.nbytes for m in messages),
    )


def over_ranks(value: float, how: dist.ReduceOp.RedOpType) -> float:
    """Sum or maximum."""
    found = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(found, how)
    return float(found)


def model_shape(hidden: int, layers: int, vocabulary: int) -> ModelShape:
    """A Qwen2 with heads of 64, four of them to a key/value head."""
    return ModelShape(
        family="qwen2",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 256,
        head_dim=64,
        ffn_size=4 * hidden,
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        max_positions=512,
        norm_eps=1e-6,
        rope_theta=1e4,
        qkv_bias=True,
        tied_embeddings=False,
    )


def random_model(shape: ModelShape) -> Any:
    """This rank's part; what is replicated must be the same on all ranks."""
    megatron = {"tensor_model_parallel_size": SIZES.tp, "pipeline_model_parallel_size": SIZES.pp}
    chunks = build_model(shape, PrecisionOptions(dtype="fp32"), megatron)
    for index, parameter in enumerate(p for chunk in chunks for p in chunk.parameters()):
        split = getattr(parameter, "tensor_model_parallel", False)
        seed = 1000 * index + (dist.get_rank() if split else 0)
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    return chunks


def main() -> None:
    """Compare them for one engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine_tp", type=int)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--bucket-mib", type=int, required=True)
    parser.add_argument("--repeat", type=int, required=True)
    known = parser.parse_args()
    tp, bucket_bytes = known.engine_tp, known.bucket_mib * 2**20
    die_with(os.getppid())
    torch.set_num_threads(1)
    distributed.initialize(rendezvous_from(os.environ), SIZES, 1, TIMEOUT_S)
    rank = dist.get_rank()
    shape = model_shape(known.hidden, known.layers, known.vocabulary)
    chunks = random_model(shape)
    training, engines = TrainingLayout(SIZES, 4), EngineLayout(tp, 4)
    plan = make_plan(shape, training, engines, DTYPE.itemsize, bucket_bytes, 4)
    engine = Engine(
        {
            "sizes": {p.name: p.size for p in engines.parameters(shape, rank % tp)},
            "dtype": DTYPE,
            "tp": tp,
            "rank": rank % tp,
            "kv_heads": shape.num_kv_heads,
        }
    )
    give_back_what_is_freed(at_once=True)
    ours, ours_peak = peak(engine, lambda: Ours(chunks, plan, engine, DTYPE))
    sums = engine.ask("checksums")
    engine.wire.send(("spoil",))
    usual, usual_peak = peak(engine, lambda: Usual(chunks, shape, engine, bucket_bytes))
    assert engine.ask("checksums") == sums, "the two ways loaded different weights"
    give_back_what_is_freed(at_once=False)
    seconds = alternate(known.repeat, [ours, usual, WithoutChecksums(ours)])
    whole = DTYPE.itemsize * sum(torch.Size(size).numel() for size in hf_shapes(shape).values())
    held = DTYPE.itemsize * sum(p.numel() for chunk in chunks for p in chunk.parameters())
    network, handed = received(plan, rank)
    mine = {
        "ours_network": network,
        "ours_handed": handed,
        "usual_network": whole - held,
        "usual_handed": usual.handed,
        "ours_peak": ours_peak,
        "usual_peak": usual_peak,
    }
    report = {
        "parameters": whole // DTYPE.itemsize,
        "rounds": len(plan.rounds),
        "ours_s": seconds[0],
        "usual_s": seconds[1],
        "without_checksums_s": seconds[2],
        "mean": {name: over_ranks(x, dist.ReduceOp.SUM) / 4 for name, x in mine.items()},
        "busiest": {name: over_ranks(x, dist.ReduceOp.MAX) for name, x in mine.items()},
    }
    engine.process.kill()
    engine.process.wait()
    if rank == 0:
        print(json.dumps(report), flush=True)
    distributed.destroy()


if __name__ == "__main__":
    main()
