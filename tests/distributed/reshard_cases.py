"""What each rank of test_reshard.py does: real Megatron shards into stand-ins for SGLang's models.

The stand-in has SGLang's parameters of one rank; the loader that runs inside SGLang runs here in a
thread and gets them through the same shared memory.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from layouts import LAYOUTS, megatron_options  # noqa: E402
from matrix import in_turn  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_prime.config import PrecisionOptions  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.rollout import weight_loader  # noqa: E402
from megatron_prime.rollout.weight_sync import Problem, WeightSync  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.weights.checksum import checksum  # noqa: E402
from megatron_prime.weights.fp8_blocks import largest_values, round_to_fp8  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402
from megatron_prime.weights.placement import EngineLayout, Form, TrainingLayout  # noqa: E402
from megatron_prime.weights.plan import make_plan  # noqa: E402
from megatron_prime.weights.reshard import Reshard  # noqa: E402
from megatron_prime.weights.safetensors_io import HfCheckpoint  # noqa: E402
from megatron_prime.weights.source import CheckpointWeights, LiveWeights  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from engine_truth import sglang_parameters  # noqa: E402

TIMEOUT_S = 60
CPU = torch.device("cpu")


class StandIn(torch.nn.Module):
    """The parameters of one SGLang rank, by their dotted names, filled with rubbish."""

    def __init__(self, plan_parameters: list, dtype: torch.dtype) -> None:
        super().__init__()
        dtypes = {Form.VALUES: dtype, Form.FP8: torch.float8_e4m3fn, Form.SCALES: torch.float32}
        self.held = {
            p.name: torch.nn.Parameter(
                torch.full(p.size, 7.0).to(dtypes[p.form]), requires_grad=False
            )
            for p in plan_parameters
        }

    def named_parameters(self, *args, **kwargs):
        return iter(self.held.items())


def load_in_thread(model: StandIn, payload: bytes) -> threading.Thread:
    thread = threading.Thread(target=weight_loader.load, args=(model, pickle.loads(payload)))
    thread.start()
    return thread


def sync_once(sync: WeightSync, source, model: StandIn, servers: range) -> Problem | None:
    payload = sync.begin()
    dist.barrier()
    thread = load_in_thread(model, payload)
    problem = sync.run(source, servers, thread.is_alive)
    thread.join()
    return problem


def check(model: StandIn, hf: dict, shape: ModelShape, tp: int, where: str) -> None:
    truth = sglang_parameters(hf, shape, tp, dist.get_rank() % tp)
    assert model.held.keys() == truth.keys(), where
    for name, wanted in truth.items():
        assert torch.equal(model.held[name], wanted), f"{where}: {name}"


def reshard_all(folder: Path) -> None:
    """Every family in every layout into engines of TP 1, 2 and 4; again after the weights moved."""
    families = sorted(path.name for path in folder.iterdir() if path.is_dir())
    reshard(folder, [(name, layout) for layout in LAYOUTS for name in families])


def reshard_in_turn(folder: Path) -> None:
    """To every layout some families, to every family some layouts."""
    reshard(folder, in_turn(sorted(path.name for path in folder.iterdir() if path.is_dir())))


def reshard(folder: Path, cases: Sequence[tuple[str, str]]) -> None:
    for layout, sizes in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        for hf_dir in (folder / name for name, where in cases if where == layout):
            shape = ModelShape.from_hf(hf_dir, sizes.tp)
            chunks = build_model(shape, PrecisionOptions(dtype="fp32"), megatron_options(sizes))
            load_hf(chunks, hf_dir, shape)
            source = LiveWeights(chunks, shape)
            hf = dict(HfCheckpoint(hf_dir).tensors())
            training = TrainingLayout(sizes, 4)
            # each layout meets two of the three engines, every pair somewhere
            skipped = (len(layout) + len(hf_dir.name)) % 3
            for tp in [tp for i, tp in enumerate((1, 2, 4)) if i != skipped]:
                where = f"{hf_dir.name} {layout} → {tp}"
                plan = make_plan(shape, training, EngineLayout(tp, 4), 4, 60_000, 4)
                assert len(plan.rounds) > 2, where
                sync = WeightSync(Reshard(plan, dist.get_rank(), torch.float32), CPU, TIMEOUT_S)
                parameters = list(plan.engine.parameters(shape, dist.get_rank() % tp))
                model = StandIn(parameters, torch.float32)
                assert sync_once(sync, source, model, range(plan.engine.servers)) is None, where
                check(model, hf, shape, tp, where)
                with torch.no_grad():
                    for chunk in chunks:
                        for parameter in chunk.parameters():
                            parameter.mul_(2)
                assert sync_once(sync, source, model, range(plan.engine.servers)) is None, where
                check(model, {k: 2 * v for k, v in hf.items()}, shape, tp, f"again: {where}")
                with torch.no_grad():
                    for chunk in chunks:
                        for parameter in chunk.parameters():
                            parameter.div_(2)
            if dist.get_rank() == 0:
                print(f"resharded {hf_dir.name} {layout}", flush=True)


def only_one_server(folder: Path) -> None:
    """A sync of server 1 alone leaves server 0's parameters; all ranks still send."""
    hf_dir = folder / "untied"
    sizes = LAYOUTS["tp2-pp2"]
    parallel_state.destroy_model_parallel()
    distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
    shape = ModelShape.from_hf(hf_dir, sizes.tp)
    chunks = build_model(shape, PrecisionOptions(dtype="fp32"), megatron_options(sizes))
    load_hf(chunks, hf_dir, shape)
    source = LiveWeights(chunks, shape)
    plan = make_plan(shape, TrainingLayout(sizes, 4), EngineLayout(2, 4), 4, 20_000, 4)
    sync = WeightSync(Reshard(plan, dist.get_rank(), torch.float32), CPU, TIMEOUT_S)
    model = StandIn(list(plan.engine.parameters(shape, dist.get_rank() % 2)), torch.float32)
    payload = sync.begin()
    dist.barrier()
    receives = dist.get_rank() >= 2
    thread = load_in_thread(model, payload) if receives else None
    problem = sync.run(source, [1], lambda: True)
    assert problem is None, problem
    if thread:
        thread.join()
        check(model, dict(HfCheckpoint(hf_dir).tensors()), shape, 2, "one server")
    else:
        assert all(bool((p == 7).all()) for p in model.held.values())
    failing_engines(sync, source, model, hf_dir, shape)


def failing_engines(sync: WeightSync, source, model: StandIn, hf_dir: Path, shape) -> None:
    """What rank 3's engine does wrong is told there; all others are loaded."""
    rank, hf = dist.get_rank(), dict(HfCheckpoint(hf_dir).tensors())

    def outcome(broken: StandIn, alive=lambda: True) -> str | None:
        payload = sync.begin()
        dist.barrier()
        thread = load_in_thread(broken, payload) if broken is not None else None
        problem = sync.run(source, [0, 1], alive)
        if thread:
            thread.join()
        if rank != 3:
            assert problem is None, problem
            check(model, hf, shape, 2, "beside a failing engine")
        return None if problem is None else problem.text

    # a parameter of another size
    other = StandIn([], torch.float32)
    other.held = dict(model.held)
    other.held["model.norm.weight"] = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    problem = outcome(other if rank == 3 else model)
    assert rank != 3 or "model.norm.weight: found [3]" in problem, problem
    # an engine that dies
    problem = outcome(None if rank == 3 else model, alive=lambda: rank != 3)
    assert rank != 3 or "died while it loaded" in problem, problem
    # a fault in the engine's memory after loading
    real = weight_loader.checksum
    if rank == 3:
        name = "model.layers.1.mlp.down_proj.weight"
        faulty = model.held[name].data

        def after_fault(values: torch.Tensor) -> torch.Tensor:
            if values.data_ptr() == faulty.data_ptr():
                values.view(-1)[5] += 1
            return checksum(values)

        weight_loader.checksum = after_fault
    problem = outcome(model)
    weight_loader.checksum = real
    assert rank != 3 or f"differ: {name}" in problem, problem
    assert outcome(model) is None  # the next sync mends it
    check(model, hf, shape, 2, "after the fault")


def fp8(folder: Path) -> None:
    """Blocks that tensor-parallel shards cut are rounded as those of the whole matrix are."""
    hf_dir = folder / "wide" / "model"
    for layout in ("tp2-pp2", "tp1-pp1", "tp2-pp1"):
        sizes = LAYOUTS[layout]
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        shape = ModelShape.from_hf(hf_dir, sizes.tp)
        chunks = build_model(shape, PrecisionOptions(dtype="fp32"), megatron_options(sizes))
        load_hf(chunks, hf_dir, shape)
        plan = make_plan(
            shape, TrainingLayout(sizes, 4), EngineLayout(1, 4, fp8=True), 4, 50_000, 4
        )
        group = parallel_state.get_tensor_model_parallel_group()
        reshard = Reshard(plan, dist.get_rank(), torch.float32, group)
        sync = WeightSync(reshard, CPU, TIMEOUT_S)
        parameters = list(plan.engine.parameters(shape, 0))
        model = StandIn(parameters, torch.float32)
        assert sync_once(sync, LiveWeights(chunks, shape), model, range(4)) is None
        truth = sglang_parameters(dict(HfCheckpoint(hf_dir).tensors()), shape, 1, 0)
        for p in parameters:
            if p.form is not Form.FP8:
                continue
            wanted = truth[p.name]
            everything = tuple((0, length) for length in wanted.shape)
            scales = largest_values(wanted, everything, tuple(wanted.shape)) / 448
            found = model.held[p.name + "_scale_inv"]
            torch.testing.assert_close(found.data, scales, rtol=0, atol=0)
            rounded = round_to_fp8(wanted, scales, everything)
            assert torch.equal(model.held[p.name].float(), rounded.float()), (layout, p.name)


def in_bf16(folder: Path) -> None:
    """Values of two bytes each, odd numbers of them, from bf16 and from fp32 parameters."""
    sizes = LAYOUTS["tp2-pp2"]
    parallel_state.destroy_model_parallel()
    distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
    for trained in ("bf16", "fp32"):
        hf_dir = folder / "llama3"
        shape = ModelShape.from_hf(hf_dir, sizes.tp)
        chunks = build_model(shape, PrecisionOptions(dtype=trained), megatron_options(sizes))
        load_hf(chunks, hf_dir, shape)
        plan = make_plan(shape, TrainingLayout(sizes, 4), EngineLayout(2, 4), 2, 10_001, 4)
        sync = WeightSync(Reshard(plan, dist.get_rank(), torch.bfloat16), CPU, TIMEOUT_S)
        model = StandIn(list(plan.engine.parameters(shape, dist.get_rank() % 2)), torch.bfloat16)
        assert sync_once(sync, LiveWeights(chunks, shape), model, range(2)) is None
        hf = {name: value.bfloat16() for name, value in HfCheckpoint(hf_dir).tensors()}
        check(model, hf, shape, 2, f"{trained} into bf16")


def from_files(folder: Path) -> None:
    """A checkpoint's files into engines, without a model."""
    hf_dir = folder / "llama3"
    sizes = LAYOUTS["tp1-pp1"]
    shape = ModelShape.from_hf(hf_dir, 1)
    plan = make_plan(shape, TrainingLayout(sizes, 4), EngineLayout(2, 4), 4, 20_000, 4)
    sync = WeightSync(Reshard(plan, dist.get_rank(), torch.float32), CPU, TIMEOUT_S)
    model = StandIn(list(plan.engine.parameters(shape, dist.get_rank() % 2)), torch.float32)
    assert sync_once(sync, CheckpointWeights(hf_dir), model, range(2)) is None
    check(model, dict(HfCheckpoint(hf_dir).tensors()), shape, 2, "files")


if __name__ == "__main__":
    distributed.initialize(rendezvous_from(os.environ), LAYOUTS["tp1-pp1"], 1, TIMEOUT_S)
    what, where = sys.argv[1], Path(sys.argv[2])
    cases = {
        "all": reshard_all,
        "in_turn": reshard_in_turn,
        "one": only_one_server,
        "fp8": fp8,
        "bf16": in_bf16,
    }
    (cases | {"files": from_files})[what](where)
    distributed.destroy()
