"""Any rank of any layout in one process: Megatron's groups over torch's fake process group.

Its collectives change nothing, so values mean nothing, but all shapes and sizes are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_prime.config import ParallelSizes
from megatron_prime.runtime.compat import before_megatron_import, install_cpu_shim

if torch.cuda.is_available():
    pytest.skip("sizes are compared on a CPU", allow_module_level=True)
before_megatron_import()
install_cpu_shim()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_prime.runtime.distributed import destroy  # noqa: E402


@contextmanager
def fake_rank(rank: int, world_size: int, sizes: ParallelSizes) -> Iterator[None]:
    """Be `rank` of `world_size` inside."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    create = parallel_state.create_group
    try:
        # The groups that Megatron wants on gloo are fake ones, too.
        parallel_state.create_group = lambda *a, **k: create(*a, **{**k, "backend": None})
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
            context_parallel_size=sizes.cp,
        )
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.create_group = create
        destroy()


def megatron_options(sizes: ParallelSizes, **more: Any) -> dict[str, Any]:
    """The `[megatron]` table of a layout."""
    options = {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "context_parallel_size": sizes.cp,
        "sequence_parallel": sizes.tp > 1,
        **more,
    }
    return options | ({"virtual_pipeline_model_parallel_size": sizes.vpp} if sizes.vpp > 1 else {})
