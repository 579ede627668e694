"""Every patch of a dependency, in one place: each says why, for which version and where.

Megatron-core 0.16.1 trains on a CPU with gloo, but it names CUDA where it means "this process's
device": it asks `torch.cuda` for the device and the random state, it writes `device="cuda"` in some
factory calls, and its optimizer recognises parameters by the names of their CUDA types. Without
CUDA, `install_cpu_shim` answers the first kind of question for good, and `megatron_calls` the
others inside a `with`: a torch function mode costs 3 µs per torch call, so it is entered around
Megatron's calls only. Upstream, with the files named below:
https://github.com/NVIDIA/Megatron-LM/tree/core_v0.16.1/megatron/core
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_prime.errors import RunError


class UnsupportedPackage(RunError, RuntimeError):
    """An installed package that megatron_prime can't work with."""


CHECKED_MEGATRON = ("0.16.1",)
CPU = torch.device("cpu")


def before_megatron_import() -> None:
    """What has to happen before the first `import megatron.core`: quiet its fallbacks, check apex.

    Without CUDA the import itself happens here, and leaves torch's compiler out.

    Only warnings that ask for nothing are hidden: plain torch functions in place of fused kernels,
    Megatron's old names for torch functions, a fault it finds with a default value of its own.
    Raises UnsupportedPackage if the package called apex is not NVIDIA's.
    """
    messages = [
        "Transformer Engine and Apex are not installed",  # optimizer/*.py, megatron_fsdp
        "Apex is not installed. Falling back to Torch Norm",  # models/backends.py:21
        "full scope is deprecated. Use empty cuda_graph_scope",  # transformer_config.py:1705
        "`torch.distributed.reduce_scatter_tensor` is deprecated",  # tensor_parallel/mappings.py
        "`torch.distributed.all_gather_into_tensor` is deprecated",  # tensor_parallel/mappings.py
        "`load_state_dict` is deprecated",  # dist_checkpointing/strategies/torch.py:799
        "Please use DTensor instead and we are deprecating ShardedTensor",  # the same
    ]
    if not torch.cuda.is_available():  # advice about CUDA's streams
        messages.append("When using async grad allreduce it is recommended")  # layers.py:738
    for message in messages:
        warnings.filterwarnings("ignore", message=message)
    # "Implicit initialization of Rerun State Machine!" (rerun_state_machine.py:238,1362): unused.
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    if find_spec("psutil") is None:
        raise UnsupportedPackage(
            "psutil is not installed, and without it Megatron's dist_checkpointing hangs for ever "
            "when it saves: pip install psutil"
        )
    check_apex(find_spec("apex") is not None, find_spec("amp_C") is not None)
    if not torch.cuda.is_available() and "megatron.core" not in sys.modules:
        _import_without_compiler()


def _import_without_compiler() -> None:
    """Import Megatron-core 0.16.1 with its `jit_fuser` off (jit.py:28), as `disable_jit_fuser`
    does, which comes too late for what is decorated in this import.

    `torch.compile` loads the compiler when it decorates: 1.7 s of a start, for kernels that only
    run on a GPU.
    """
    compiler, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
    try:
        from megatron.core import jit

        jit.disable_jit_fuser()
    finally:
        torch.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    return _as_it_is if function is None else function


def check_apex(found: bool, has_kernels: bool) -> None:
    """UnsupportedPackage for a package `apex` without NVIDIA's compiled `amp_C`, such as PyPI's."""
    if found and not has_kernels:
        raise UnsupportedPackage(
            "found a package apex without NVIDIA's kernels (amp_C): the apex on PyPI is something "
            "else; pip uninstall apex, and build NVIDIA's from its source if you want it"
        )


def install_cpu_shim() -> None:
    """Let Megatron-core find a CPU where it asks for the current CUDA device.

    Does nothing where CUDA is present, and nothing the second time. Raises UnsupportedPackage
    if the installed Megatron-core is not one that the shim was checked with.
    """
    if torch.cuda.is_available() or torch.cuda.synchronize is _nothing:
        return
    check_megatron_version(metadata.version("megatron-core"))
    before_megatron_import()
    import megatron.core.tensor_parallel.random as megatron_random

    # The device: models/common/embeddings/rotary_pos_embedding.py:162,
    # transformer/attention.py:430, pipeline_parallel/p2p_communication.py:190-202,313,321,
    # distributed/param_and_grad_buffer.py:800,806. Waiting for it: p2p_communication.py:242,398,
    # timers.py:152,165, dist_checkpointing/strategies/{filesystem_async:230,fully_parallel:272}.py.
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing
    # Random state: tensor_parallel/random.py:56,99-112,235-238,422. The CPU's generator plays both.
    torch.cuda.manual_seed = _manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = _set_rng_state
    megatron_random._get_cuda_rng_state = _get_rng_state
    megatron_random._set_cuda_rng_state = _set_rng_state


def check_megatron_version(found: str) -> None:
    """UnsupportedPackage unless the CPU shim was checked with this version of Megatron-core."""
    if found not in CHECKED_MEGATRON:
        raise UnsupportedPackage(
            f"found megatron-core {found}; without CUDA megatron_prime runs with "
            f"{', '.join(CHECKED_MEGATRON)} only: pip install megatron-core=={CHECKED_MEGATRON[-1]}"
        )


def megatron_calls() -> AbstractContextManager[object]:
    """Surrounds calls into Megatron's schedules, optimizer, checkpoints and model construction.

    Without CUDA the literal `device="cuda"` means the CPU inside; with CUDA it does nothing.
    """
    return nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


def save_in_process() -> None:
    """Let a synchronous checkpoint hand over its results without a process of its own.

    Megatron-core 0.16.1 starts a manager process for them, which outlives a killed rank and keeps
    its stdout open (dist_checkpointing/strategies/filesystem_async.py, _get_write_results_queue).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = SimpleQueue()


class _CudaMeansCpu(TorchFunctionMode):
    """Reads `device="cuda"`, `pin_memory=True` and `.cuda()` as the CPU.

    Call sites: pipeline_parallel/schedules.py:596,983,2138, optimizer/optimizer.py:481,485,907,
    optimizer/clip_grads.py:90,103,115,174,207, utils.py:1207,
    dist_checkpointing/exchange_utils.py:98-110,336,499, models/common/embeddings/rope_utils.py:63,
    models/common/language_module/language_module.py:244.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1:
            return _type_name(args[0], sys._getframe(1).f_globals.get("__name__", ""))
        return func(*args)


def _type_name(tensor: Tensor, asker: str) -> str:
    """`Tensor.type()`, which Megatron's optimizer compares with CUDA names.

    Call sites in optimizer/: clip_grads.py:167, optimizer.py:671,690,
    distrib_optimizer.py:361,420,582.
    """
    name = str(tensor.type())
    in_optimizer = asker.startswith("megatron.core.optimizer")
    return name.replace("torch.", "torch.cuda.", 1) if in_optimizer else name


def _current_device() -> torch.device:
    return CPU


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(*_args: Any, **_kwargs: Any) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.set_rng_state(new_state)
