"""Runs inside every SGLang process: copies what the trainer hands over into the live parameters.

SGLang calls `load` for each `/update_weights_from_tensor` that names it (`--custom-weight-loader`),
with the model of this tensor-parallel rank. The one "tensor" of the request carries no values; its
name is JSON: the ticket of the shared memory, which is opened at the first sync, and the sync's
number. An exception would end SGLang's scheduler, so a failed load is reported through the shared
memory instead. Only torch and the standard library are imported.
"""

from __future__ import annotations

import json
import traceback

import torch
from torch import Tensor

from megatron_prime.weights.checksum import checksum
from megatron_prime.weights.handover import Handover

_open: dict[str, Handover] = {}  # by ticket; the last one only


def load(model: torch.nn.Module, named_tensors: list[tuple[str, Tensor]]) -> None:
    """Take part in one sync."""
    ((name, _),) = named_tensors
    request = json.loads(name)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    ticket, sync = request["ticket"], request["sync"]
    if ticket not in _open:
        _open.clear()
        _open[ticket] = Handover.open(ticket, device)
    handover = _open[ticket]
    try:
        if problem := _differences(parameters, handover):
            handover.failed(sync, problem)
        elif _receive(parameters, handover, sync):
            handover.done()
    except Exception:  # it is the trainer's to handle; here it would end the scheduler
        handover.failed(sync, traceback.format_exc())


@torch.no_grad()
def _receive(parameters: dict[str, torch.nn.Parameter], handover: Handover, sync: int) -> bool:
    """Load round after round; False when the trainer has given up."""
    # No piece fills a padded vocabulary's rows, and what was released comes back with anything.
    for parameter in parameters.values():
        parameter.zero_()
    number = 0
    for round_, pieces in enumerate(handover.layout.rounds):
        if not handover.wait_published(sync, round_):
            return False
        buffer = handover.buffers[round_ % 2]
        targets = []
        for piece in pieces:
            target = parameters[piece.parameter].data[
                tuple(slice(*bounds) for bounds in piece.region)
            ]
            dtype = getattr(torch, piece.dtype)
            nbytes = target.numel() * dtype.itemsize
            value = buffer[piece.offset : piece.offset + nbytes].view(dtype)
            target.copy_(value.view(target.shape))
            targets.append(target)
        if buffer.is_cuda:
            torch.cuda.current_stream().synchronize()  # the copies are done
        handover.loaded(round_)
        if targets:  # read back from the live parameters, not from the buffer
            found = torch.stack([checksum(target) for target in targets])
            handover.checksums[number : number + len(targets)] = found.cpu()
        number += len(targets)
    return True


def _differences(parameters: dict[str, torch.nn.Parameter], handover: Handover) -> str:
    """How the live model differs from what the plan thinks it is; empty if it does not."""
    wanted, dtypes = handover.layout.parameters, handover.layout.dtypes
    live = {name: list(parameter.shape) for name, parameter in parameters.items()}
    lines = [
        f"{name}: found {live.get(name)}, the plan has {wanted.get(name)}"
        for name in sorted(live.keys() | wanted.keys())
        if live.get(name) != wanted.get(name)
    ]
    lines += [
        f"{name}: found {parameter.dtype}, the plan has {dtypes[name]}"
        for name, parameter in parameters.items()
        if name in dtypes and str(parameter.dtype) != f"torch.{dtypes[name]}"
    ]
    return "\n".join(lines[:20])
