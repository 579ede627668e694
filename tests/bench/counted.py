"""Every byte that this process hands to torch.distributed, by group and operation.

Import it, and call `install`, before Megatron: that binds some of these functions when it is
imported. What counts is the whole tensor of a collective: the one that is reduced, the one that is
gathered (all ranks' parts together) or the one that is scattered; and what is sent point to point.
A group of one rank exchanges nothing. A collective that is not counted raises `NotCounted`, so that
a count is never silently too low; only what is called on a process group's own methods goes unseen.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

Bytes = dict[str, int]  # "group operation": bytes

_TAKEN: Counter[str] = Counter()
_NAMES: dict[Any, str] = {}
_INSIDE: list[str] = []
_OPERATIONS = {  # by the name that is counted, its functions and the argument that is the whole
    "all_reduce": {"all_reduce": 0},
    "all_gather": {"all_gather_into_tensor": 0, "_all_gather_base": 0, "all_gather": 0},
    "reduce_scatter": {"reduce_scatter_tensor": 1, "_reduce_scatter_base": 1, "reduce_scatter": 1},
    "broadcast": {"broadcast": 0},
    "send": {"isend": 0, "send": 0},
}
_REFUSED = (  # nothing here has a use for them
    *("reduce", "gather", "scatter", "all_to_all", "all_to_all_single"),
    *("all_reduce_coalesced", "all_gather_coalesced"),
    *("all_gather_single", "reduce_scatter_single"),  # newer names
)
_KEYWORDS = ("tensor", "output_tensor", "tensor_list", "input", "input_list", "output")


class NotCounted(RuntimeError):
    """A collective that this module does not know how to count."""


def install() -> None:
    """Put a counter before each function, wherever torch.distributed shows it."""
    for operation, functions in _OPERATIONS.items():
        for name, whole in functions.items():
            _replace(name, _counting(operation, getattr(c10d, name), whole))
    for name in _REFUSED:
        if hasattr(c10d, name):
            _replace(name, _refusing(name, getattr(c10d, name)))


def _replace(name: str, other: Any) -> None:
    real = getattr(c10d, name)
    setattr(c10d, name, other)
    if getattr(dist, name, None) is real:
        setattr(dist, name, other)


def name_groups() -> None:
    """Learn Megatron's groups; again whenever they were made anew."""
    from megatron.core import parallel_state as megatron

    _NAMES.clear()
    for name, found in {
        "embedding": megatron.get_embedding_group(check_initialized=False),
        "replica": megatron.get_model_parallel_group(),
        "dp": megatron.get_data_parallel_group(),
        "dp ": megatron.get_data_parallel_group(with_context_parallel=True),
        "pp": megatron.get_pipeline_model_parallel_group(),
        "cp": megatron.get_context_parallel_group(),
        "tp": megatron.get_tensor_model_parallel_group(),
    }.items():
        _NAMES[found] = name.strip()


def take() -> Bytes:
    """What was counted since the last call."""
    found = dict(sorted(_TAKEN.items()))
    _TAKEN.clear()
    return found


def _counting(operation: str, real: Any, whole: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        group = _group(args, kwargs)
        if not _INSIDE and dist.get_world_size(group) > 1:
            name = _NAMES.get(group, "world")
            if operation == "send":  # a pipeline of two sends one way in the world's group
                name = "ranks"
            _TAKEN[f"{name} {operation}"] += _nbytes(args, kwargs, whole)
        _INSIDE.append(operation)  # torch calls some of its functions once more, by a group's rank
        try:
            return real(*args, **kwargs)
        finally:
            _INSIDE.pop()

    call.__name__ = real.__name__
    return call


def _refusing(name: str, real: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _INSIDE and dist.get_world_size(_group(args, kwargs)) > 1:
            raise NotCounted(
                f"found a call of torch.distributed.{name}, wanted one of {list(_OPERATIONS)}; "
                "add it to _OPERATIONS of tests/bench/counted.py"
            )
        return real(*args, **kwargs)

    call.__name__ = real.__name__
    return call


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    group = kwargs.get("group")
    if group is None:
        group = next((one for one in args if isinstance(one, dist.ProcessGroup)), None)
    return group or dist.group.WORLD


def _nbytes(args: tuple[Any, ...], kwargs: dict[str, Any], whole: int) -> int:
    tensors = args[whole] if len(args) > whole else None
    if tensors is None:
        wanted = ("input", "input_list") if whole else _KEYWORDS
        tensors = next(kwargs[name] for name in wanted if name in kwargs)
    if isinstance(tensors, torch.Tensor):
        tensors = [tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
