"""Bytes that one rank hands to each exchange with others, exactly, by Megatron's formulae.

A model's rank works on m packs of S tokens (of its context-parallel share), n of them before a
response token; h is the hidden size, b the bytes of a value, t, p, c the parallel sizes. Counted is
the whole tensor: what is reduced, what is gathered together or scattered, what is sent.

    TP   forward   the embedding's sums and 2 per layer: S h b each, all-reduced
                   log-probs: the maximum and 3 sums of n tokens in fp32
         backward  2 per layer, and the output layer's n h b, all-reduced
         a critic has no log-probs, and its values need no exchange; with sequence parallelism they
         are gathered forward, S in fp32
         with sequence parallelism an all-reduce is a reduce-scatter or an all-gather, or both: per
                   layer 2 + 2 forward, and backward 2 + 2 and the 2 inputs gathered again;
                   gradients of norms, which each rank has a part of, are all-reduced
    PP   S h b (/ t with sequence parallelism) to the next stage and back, for each virtual stage
    DP   gradients in fp32 all-reduced; with the distributed optimizer reduce-scattered, and new
         weights all-gathered
    CP   keys and values gathered forward, their gradients scattered backward (torch layers; those
         of Transformer Engine pass them round, which is the same but for the rank's own)

`planner/training.py` turns the largest of these into seconds. With recomputation, which is not in
here, the forward's come once more. The counts of real steps are equal to these numbers
(tests/distributed/test_exchanges.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_prime.planner.counts import Parameter, chunks
from megatron_prime.planner.states import VALUE_BYTES, Sharding, trained_bytes
from megatron_prime.planner.training import Trainer

_FP32 = 4


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch on one rank."""

    tokens: int
    wanted: int  # before a response token
    answers: int  # rows times the longest response


@dataclass(frozen=True, slots=True)
class Exchanges:
    """Of one model on one rank of pipeline stage `stage`; bytes by "group operation"."""

    trainer: Trainer
    stage: int

    def forward(self, packs: Sequence[Pack]) -> Counter[str]:
        """Without gradients."""
        return self._passes(packs, backward=False)

    def update(self, packs: Sequence[Pack], distributed: bool) -> Counter[str]:
        """One optimizer step."""
        return self._passes(packs, backward=True) + self._gradients(distributed)

    def _passes(self, packs: Sequence[Pack], backward: bool) -> Counter[str]:
        found: Counter[str] = Counter()
        for pack in packs:
            found += self._tensor_parallel(pack, backward) + self._context_parallel(pack, backward)
            found += self._pipeline(pack, backward)
        return found

    def _tensor_parallel(self, pack: Pack, backward: bool) -> Counter[str]:
        shape, sizes = self.trainer.shape, self.trainer.sizes
        if sizes.tp == 1:
            return Counter()
        layers, hidden = shape.num_layers // sizes.pp, self._hidden(pack.tokens)
        embedding, head = hidden * self._is_first, self._is_last and not shape.value_head
        values = _FP32 * pack.tokens * (self._is_last and shape.value_head)
        logprobs = 4 * _FP32 * pack.wanted * head
        if not self._sequence_parallel:
            sums = embedding + 2 * layers * hidden + logprobs
            if backward:
                sums += 2 * layers * hidden + head * self._hidden(pack.wanted)
            return Counter({"tp all_reduce": sums})
        gathered = 2 * layers * hidden + head * hidden + values
        scattered = embedding + 2 * layers * hidden
        if backward:
            gathered += embedding + 4 * layers * hidden + head * hidden
            scattered += 2 * layers * hidden + head * hidden
        return Counter(
            {
                "tp all_gather": gathered,
                "tp reduce_scatter": scattered,
                "tp all_reduce": logprobs,
            }
        )

    def _context_parallel(self, pack: Pack, backward: bool) -> Counter[str]:
        shape, sizes = self.trainer.shape, self.trainer.sizes
        if sizes.cp == 1:
            return Counter()
        width = 2 * shape.num_kv_heads * shape.head_dim // sizes.tp
        both = self._value * width * pack.tokens * sizes.cp * shape.num_layers // sizes.pp
        answers = 2 * _FP32 * pack.answers * self._is_last
        found = Counter({"cp all_gather": both, "cp all_reduce": answers})
        return found + Counter({"cp reduce_scatter": both * backward})

    def _pipeline(self, pack: Pack, backward: bool) -> Counter[str]:
        """Virtual stages send on from the last rank to the first, too."""
        sizes = self.trainer.sizes
        if sizes.pp == 1:
            return Counter()
        hidden = self._hidden(pack.tokens)
        if self._sequence_parallel:
            hidden //= sizes.tp
        on = sizes.vpp - self._is_last
        back = (sizes.vpp - self._is_first) * backward
        return Counter({"ranks send": (on + back) * hidden})

    def _gradients(self, distributed: bool) -> Counter[str]:
        """After the last backward pass."""
        sizes, precision = self.trainer.sizes, self.trainer.precision
        ranks = sizes.cp * self.trainer.data_parallel
        parts = chunks(self.trainer.shape, sizes, self.stage)
        held = [one for part in parts for one in part]
        sharding = Sharding(distributed, 0, ranks, self.trainer.data_parallel, self.stage)
        gradients = trained_bytes(
            parts, self.trainer.shape.num_layers, precision, sharding
        ).gradients
        found: Counter[str] = Counter()
        if ranks > 1 and distributed:
            found["dp reduce_scatter"] = gradients
            found["dp all_gather"] = gradients // _FP32 * self._value
        elif ranks > 1:
            found["dp all_reduce"] = gradients
        if sizes.tp > 1:
            partial = [one for one in held if self._is_partial(one)]
            found["tp all_reduce"] = _FP32 * sum(one.numel for one in partial)
        shared = sum(one.numel for one in held if one.is_shared_embedding)
        found["embedding all_reduce"] = _FP32 * shared
        norm = "world" if distributed else "replica"  # who has parts of the gradients
        if sizes.tp * sizes.pp * (ranks if distributed else 1) > 1:
            found[f"{norm} all_reduce"] = _FP32
        return found

    def _is_partial(self, parameter: Parameter) -> bool:
        """Whether each tensor-parallel rank has a part of its gradient: all of its tokens' or of
        its heads'."""
        heads = parameter.name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        norm = parameter.name.endswith("norm.weight")
        value_head = self.trainer.shape.value_head and parameter.name == "output_layer.weight"
        return heads or ((norm or value_head) and self._sequence_parallel)

    def _hidden(self, tokens: int) -> int:
        return tokens * self.trainer.shape.hidden_size * self._value

    @property
    def _value(self) -> int:
        return VALUE_BYTES[self.trainer.precision.dtype]

    @property
    def _is_first(self) -> bool:
        return self.stage == 0

    @property
    def _is_last(self) -> bool:
        return self.stage == self.trainer.sizes.pp - 1

    @property
    def _sequence_parallel(self) -> bool:
        return bool(self.trainer.megatron.get("sequence_parallel")) and self.trainer.sizes.tp > 1


def on_the_wire(found: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a rank sends in a ring, by group of `sizes` ranks: of each tensor all but its own
    part, and twice that of one that is all-reduced."""
    sent: dict[str, float] = {}
    for what, nbytes in found.items():
        group, operation = what.split()
        times = {"all_reduce": 2, "send": 0}.get(operation, 1)
        ranks = sizes.get(group, 2)
        part = nbytes * times * (ranks - 1) / ranks if operation != "send" else nbytes
        sent[group] = sent.get(group, 0.0) + part
    return sent
