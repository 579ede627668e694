"""Seconds of forward passes and updates of one sharded model, by what they wait for.

The slowest pipeline stage (the last one, which makes the logits, or any) sets the pace:

    compute   operations of its layers / achieved rate; backward twice the forward; recomputation
              once more what it drops
    nvlink    tensor parallelism: of each layer's hidden states the other ranks' (t - 1) / t, twice
              gathered and twice scattered in each direction; not overlapped, but with
              `megatron.tp_comm_overlap`: then what outlasts the linears. That sequence parallelism
              gathers inputs again in the backward pass is hidden behind its products
    pipeline  waiting for the first and last micro-batches: (p - 1) / (m v) of a stage's work, with
              m micro-batches and v virtual stages; and hidden states handed on, not overlapped
    network   gradients in fp32 are scattered over the data-parallel ranks during the last
              micro-batch's backward pass, and cost what they outlast it; new weights are gathered
              after the step, not overlapped. A ring through nodes uses the adapters of all its
              members in a node, but no more than NVLink
    hbm       the optimizer's step

Context parallelism passes keys and values round while attention computes, and costs what they
outlast it. Ranks are all equally fast, packs equally full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_prime.config import BatchSection, ParallelSizes, PrecisionOptions
from megatron_prime.planner.flops import Load, forward_flops, linear_values
from megatron_prime.planner.rates import Rates
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.weights.shape import ModelShape

Seconds = dict[str, float]  # by what they are spent on

# Bytes of device memory per value. Of a rank's shard: Adam reads gradient, master and moments and
# writes the last three and a bf16 weight, and the norm reads gradients once more. Of all its
# gradients: they are zeroed, and looked at for NaN.
_STEP, _GRADIENTS = 4 + 4 + 8 + 4 + 8 + 2 + 4, 4 + 4


def add(*parts: Mapping[str, float]) -> Seconds:
    """Sums by key."""
    found: Seconds = {}
    for part in parts:
        for name, seconds in part.items():
            found[name] = found.get(name, 0.0) + seconds
    return found


def times(part: Mapping[str, float], number: float) -> Seconds:
    """The same, `number` times."""
    return {name: seconds * number for name, seconds in part.items()}


@dataclass(frozen=True, slots=True)
class Trainer:
    """One model as its ranks share it."""

    shape: ModelShape
    sizes: ParallelSizes
    data_parallel: int
    precision: PrecisionOptions
    megatron: Mapping[str, Any]
    knobs: BatchSection
    rates: Rates

    def forward(self, load: Load, rows: int) -> Seconds:
        """Log-probs of `rows` sequences in all, without gradients."""
        work = self._pass(load * (1 / self.data_parallel))
        return self._in_pipeline(work, load, rows, passes=1)

    def update(self, load: Load, rows: int) -> Seconds:
        """Mini-batches of `knobs.mini_batch_size`, an optimizer step each."""
        count = max(1, rows // self.knobs.mini_batch_size)
        share = load * (1 / count)
        forward = self._pass(share * (1 / self.data_parallel))
        backward = self._pass(share * (1 / self.data_parallel), backward=True)
        rows = rows // count
        step = self._in_pipeline(add(forward, backward), share, rows, passes=2)
        hidden = sum(backward.values()) / self.micro_batches(share, rows)
        return times(add(step, self._optimizer(hidden)), count)

    def micro_batches(self, load: Load, rows: int) -> int:
        """Of one data-parallel rank; as data/packing.py cuts them."""
        multiple = self.sizes.pp if self.sizes.vpp > 1 else 1
        capacity = self.knobs.micro_batch_tokens * self.sizes.cp * self.data_parallel
        number = max(ceil(load.tokens / capacity), self.sizes.pp)
        number = min(number, max(1, rows // self.data_parallel))
        return ceil(number / multiple) * multiple

    def _pass(self, load: Load, backward: bool = False) -> Seconds:
        """Of one data-parallel replica's `load` through the slowest stage."""
        sizes, rates = self.sizes, self.rates
        flops, ranks = forward_flops(self.shape, load), sizes.tp * sizes.cp
        linears = flops.linears / (self._linear_rate() * ranks * sizes.pp)
        attention = flops.attention / (self._rate() * ranks * sizes.pp)
        head = flops.head / (self._rate() * ranks)
        compute = linears + attention + head
        around = max(0.0, self._cache_ring(load) - attention)
        if backward:
            again_linears, again_attention = self._recomputed()
            compute = 2 * compute + again_linears * linears + again_attention * attention
            around *= 2
        ring = "network" if sizes.tp > rates.ranks_per_node else "nvlink"
        waiting = self.tensor_bytes(load, backward) / float(getattr(rates, ring))
        if self.megatron.get("tp_comm_overlap"):
            waiting = max(0.0, waiting - (2 if backward else 1) * linears)
        found = {"compute": compute, ring: waiting}
        return add(found, {self._cp_link(): around}) if sizes.cp > 1 else found

    def _in_pipeline(self, work: Seconds, load: Load, rows: int, passes: int) -> Seconds:
        """A stage's work, with the wait for the others; hidden states go on in each of `passes`."""
        sizes = self.sizes
        if sizes.pp == 1:
            return work
        waiting = (sizes.pp - 1) / (self.micro_batches(load, rows) * sizes.vpp)
        handed = passes * sizes.vpp * self.handed_on(load * (1 / self.data_parallel))
        return add(work, {"pipeline": waiting * sum(work.values()) + handed})

    def handed_on(self, load: Load) -> float:
        """Seconds in which one replica's hidden states go from a stage to the next."""
        near = self.sizes.replica * self.data_parallel // self.sizes.pp < self.rates.ranks_per_node
        return self.handed_bytes(load) / (self.rates.nvlink if near else self.rates.network)

    def tensor_bytes(self, load: Load, backward: bool) -> float:
        """That a rank sends to its tensor-parallel neighbours, of a replica's `load`."""
        sizes, layers = self.sizes, self.shape.num_layers / self.sizes.pp
        collectives = 4 + 4 * self._recomputed()[0] * backward
        return collectives * layers * self._hidden_bytes(load) * (sizes.tp - 1) / sizes.tp

    def handed_bytes(self, load: Load) -> float:
        """That a rank sends to the next stage, of a replica's `load`."""
        return self._hidden_bytes(load) / (self.sizes.tp if self._sequence_parallel() else 1)

    def shard_bytes(self) -> tuple[float, float]:
        """That a rank sends around of gradients, and of new weights, in an optimizer step."""
        group = self.sizes.cp * self.data_parallel
        others = self._values() * (group - 1) / group
        return 4 * others, VALUE_BYTES[self.precision.dtype] * others

    def pass_seconds(self, load: Load, backward: bool) -> float:
        """Of one replica's `load` through a stage; its `wanted` logits are made by the last."""
        return sum(self._pass(load, backward).values())

    def _optimizer(self, hidden: float) -> Seconds:
        """After the last backward pass; `hidden`: seconds that it gave the gradients' exchange."""
        sizes, rates, values = self.sizes, self.rates, self._values()
        group = sizes.cp * self.data_parallel
        link, speed = self.ring(group)
        scattered, gathered = (nbytes / speed for nbytes in self.shard_bytes())
        hbm = (values / group * _STEP + values * _GRADIENTS) / rates.hbm
        return {"hbm": hbm, link: max(0.0, scattered - hidden) + gathered}

    def _values(self) -> float:
        """In the matrices of the stage that has most."""
        sizes, vocabulary = self.sizes, self.shape.hidden_size * self.shape.padded_vocab_size
        both = sizes.pp == 1 and not (self.shape.tied_embeddings or self.shape.value_head)
        layers = linear_values(self.shape) * self.shape.num_layers / sizes.pp
        return (layers + vocabulary * (2 if both else 1)) / sizes.tp

    def ring(self, group: int) -> tuple[str, float]:
        """What limits a ring of ranks that are `sizes.tp` apart, and its bytes per second."""
        in_node = max(1, self.rates.ranks_per_node // self.sizes.tp)
        if group <= in_node:
            return "nvlink", self.rates.nvlink
        together = in_node * self.rates.network
        return min(("network", together), ("nvlink", self.rates.nvlink), key=lambda one: one[1])

    def _cache_ring(self, load: Load) -> float:
        """Seconds in which keys and values go round the context-parallel ranks."""
        sizes, shape = self.sizes, self.shape
        width = 2 * shape.num_kv_heads * shape.head_dim / sizes.tp * shape.num_layers / sizes.pp
        nbytes = VALUE_BYTES[self.precision.dtype] * width * load.tokens * (sizes.cp - 1) / sizes.cp
        return nbytes / float(getattr(self.rates, self._cp_link()))

    def _cp_link(self) -> str:
        near = self.sizes.tp * self.sizes.cp <= self.rates.ranks_per_node
        return "nvlink" if near else "network"

    def _hidden_bytes(self, load: Load) -> float:
        """Hidden states of a replica's tokens on one context-parallel rank."""
        value = VALUE_BYTES[self.precision.dtype]
        return value * self.shape.hidden_size * load.tokens / self.sizes.cp

    def _recomputed(self) -> tuple[float, float]:
        """Shares of the linears and of attention that the backward pass computes again."""
        granularity = self.megatron.get("recompute_granularity")
        if granularity == "full":
            layers = self.shape.num_layers // (self.sizes.pp * self.sizes.vpp)
            blocks = self.megatron.get("recompute_method") == "block"
            some = min(layers, self.megatron.get("recompute_num_layers") or 1)
            share = some / layers if blocks else 1.0
            return share, share
        modules = self.megatron.get("recompute_modules") or ("core_attn",)
        if granularity != "selective":
            return 0.0, 0.0
        mlp = 3 * self.shape.hidden_size * self.shape.ffn_size / linear_values(self.shape)
        return mlp if "mlp" in modules else 0.0, float("core_attn" in modules)

    def _sequence_parallel(self) -> bool:
        return bool(self.megatron.get("sequence_parallel")) and self.sizes.tp > 1

    def _rate(self) -> float:
        return self.rates.flops(self.precision.dtype)

    def _linear_rate(self) -> float:
        """FP8 in all layers but those that are left in bf16."""
        if self.precision.fp8 is None:
            return self._rate()
        kept = 0
        if self.precision.first_last_layers_bf16:
            options = self.precision
            kept = options.num_layers_at_start_in_bf16 + options.num_layers_at_end_in_bf16
        share = min(1.0, kept / self.shape.num_layers)
        return 1 / (share / self._rate() + (1 - share) / self.rates.flops("fp8"))
