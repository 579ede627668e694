"""A stand-in for the SGLang process beside one trainer rank: its parameters, two ways to load.

Started by the ranks of bench_reshard.py, which speak to it over a pipe. `direct` takes part in a
sync of ours with the loader that runs inside SGLang. `bucket` does what `model.load_weights` does
with a flattened bucket: takes each whole tensor out of it, narrows it to this rank's rows or
columns, and copies that into its rows of the fused parameter.
"""

from __future__ import annotations

import pickle
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
from measure import Extra
from torch import Tensor

from megatron_prime.rollout import weight_loader
from megatron_prime.runtime.parent import die_with
from megatron_prime.weights.checksum import checksum
from megatron_prime.weights.handover import Handover


class StandIn(torch.nn.Module):
    """Live parameters by their dotted names."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.held = {
            name: torch.nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
            for name, size in sizes.items()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.held.items())


class Buckets:
    """The usual way's side of the engine."""

    def __init__(self, model: StandIn, tp: int, rank: int, kv_heads: int, dtype: torch.dtype):
        self.model, self.tp, self.rank, self.kv_heads, self.dtype = model, tp, rank, kv_heads, dtype
        self.memory: Handover | None = None

    @torch.no_grad()
    def load(self, which: int, content: list[tuple[str, tuple[int, ...], int]]) -> None:
        """All tensors of a bucket: name, size, where its bytes start."""
        assert self.memory is not None
        for name, size, start in content:
            nbytes = torch.Size(size).numel() * self.dtype.itemsize
            flat = self.memory.buffers[which][start : start + nbytes]
            self.load_weight(name, flat.view(self.dtype).view(size))

    def load_weight(self, name: str, whole: Tensor) -> None:
        """As SGLang's weight loaders: a slice of the whole tensor into a slice of the parameter."""
        tp, rank, held = self.tp, self.rank, self.model.held
        layer, _, part = name.rpartition("self_attn.")
        if part[:7] in ("q_proj.", "k_proj.", "v_proj."):
            parameter = held[f"{layer}self_attn.qkv_proj.{part[7:]}"].data
            kv = max(1, self.kv_heads // tp) * (whole.shape[0] // self.kv_heads)
            if part[0] == "q":
                rows = whole.shape[0] // tp
                parameter[:rows].copy_(whole[rank * rows : (rank + 1) * rows])
                return
            first = rank * kv if tp <= self.kv_heads else rank * self.kv_heads // tp * kv
            end = parameter.shape[0] - (kv if part[0] == "k" else 0)
            parameter[end - kv : end].copy_(whole[first : first + kv])
        elif "gate_proj" in name or "up_proj" in name:
            fused = name.replace("gate_proj", "gate_up_proj")
            parameter = held[fused.replace("mlp.up_proj", "mlp.gate_up_proj")].data
            rows = whole.shape[0] // tp
            at = rows if "mlp.up_proj" in name else 0
            parameter[at : at + rows].copy_(whole[rank * rows : (rank + 1) * rows])
        elif "embed_tokens" in name or "lm_head" in name:
            parameter = held[name].data
            mine = whole[rank * len(parameter) : (rank + 1) * len(parameter)]
            parameter[: len(mine)].copy_(mine)
            parameter[len(mine) :].zero_()
        elif "o_proj" in name or "down_proj" in name:
            columns = whole.shape[1] // tp
            held[name].data.copy_(whole[:, rank * columns : (rank + 1) * columns])
        else:
            held[name].data.copy_(whole)


def no_checksum(_: Tensor) -> Tensor:
    """What a sync takes without."""
    return torch.zeros((), dtype=torch.int64)


def serve(wire: Connection) -> None:
    """Do what the rank says; the first message describes the model."""
    given = wire.recv()
    model = StandIn(given["sizes"], given["dtype"])
    buckets = Buckets(model, given["tp"], given["rank"], given["kv_heads"], given["dtype"])
    while True:
        what, *rest = wire.recv()
        if what == "direct":
            weight_loader.load(model, pickle.loads(rest[0]))
        elif what == "open":
            buckets.memory = Handover.open(rest[0], torch.device("cpu"))
        elif what == "bucket":
            buckets.load(*rest)
            wire.send("loaded")
        elif what == "spoil":
            for parameter in model.held.values():
                parameter.data.fill_(1)
        elif what == "proof":  # whether to take checksums
            weight_loader.checksum = checksum if rest[0] else no_checksum
        elif what == "checksums":
            wire.send({name: int(checksum(p.data)) for name, p in model.held.items()})
        elif what == "measure":
            extra = Extra()
            wire.send("ready")
        elif what == "extra":
            wire.send(extra.private_bytes())


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    torch.set_num_threads(1)
    serve(Connection(int(sys.argv[1])))
