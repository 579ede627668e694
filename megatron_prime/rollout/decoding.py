"""A plain decode loop: one prefill, then one token at a time with a key/value cache.

Prompts are padded on the left, so that all rows write the same cache column; a row's positions
count its own tokens only, and its mask hides the padding. Each distinct prompt is prefilled once
and its cache rows are copied to its responses. Rows that have ended ride along until they are half
of the batch, then the batch is cut down to the others; rows never see each other, so that changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from megatron_prime.errors import NotFinite
from megatron_prime.rollout.sampling import choose_tokens, uniforms
from megatron_prime.types import Prompt, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be sampled."""

    prompt: Prompt
    sample: int  # its number within the group


@dataclass(frozen=True, slots=True)
class Response:
    """What was sampled; `token_ids` ends with an end-of-sequence token unless it was cut."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


class RoomyLayer(DynamicLayer):
    """A cache layer with room for the whole sequence: a step writes one column and copies none.

    `keys` and `values` are views [rows, heads, columns written, head_dim] of the room.
    """

    def __init__(self, columns: int) -> None:
        """Nothing is allocated before the first update, which brings shape, type and device."""
        super().__init__()
        self.columns = columns
        self.written = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new columns [rows, heads, new, head_dim]; return all columns written."""
        if not self.is_initialized:
            self._allocate(key_states.shape[0], key_states)
        start, self.written = self.written, self.written + key_states.shape[2]
        self.key_room[:, :, start : self.written] = key_states
        self.value_room[:, :, start : self.written] = value_states
        return self._show()

    def take_rows(self, rows: Tensor) -> None:
        """Become the cache of the given rows [R], which may repeat."""
        keys, values = self.keys, self.values
        self._allocate(len(rows), keys)
        self.key_room[:, :, : self.written] = keys[rows]
        self.value_room[:, :, : self.written] = values[rows]
        self._show()

    def _allocate(self, rows: int, like: Tensor) -> None:
        shape = (rows, like.shape[1], self.columns, like.shape[3])
        self.key_room, self.value_room = like.new_empty(shape), like.new_empty(shape)
        self.is_initialized = True

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self.key_room[:, :, : self.written]
        self.values = self.value_room[:, :, : self.written]
        return self.keys, self.values


class Decoder:
    """The model with its cache; a row per sequence still decoded."""

    def __init__(self, model: Any, columns: int) -> None:
        """Room for `columns` tokens per row, padding included."""
        self.model = model
        self.device: torch.device = model.device
        self.layers = [RoomyLayer(columns) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Logits after each prompt [U, V], and the mask of their tokens, bool [U, longest]."""
        longest = max(len(prompt.token_ids) for prompt in prompts)
        padding = [longest - len(prompt.token_ids) for prompt in prompts]
        tokens_UP = torch.tensor(
            [[0] * pad + list(p.token_ids) for pad, p in zip(padding, prompts, strict=True)],
            device=self.device,
        )
        columns_P = torch.arange(longest, device=self.device)
        valid_UP = columns_P >= torch.tensor(padding, device=self.device)[:, None]
        causal_PP = columns_P <= columns_P[:, None]
        itself_PP = columns_P == columns_P[:, None]  # or a padding row would have nothing to see
        mask_UPP = causal_PP & (valid_UP[:, None, :] | itself_PP)
        positions_UP = (valid_UP.cumsum(-1) - 1).clamp(min=0)
        return self._forward(tokens_UP, mask_UPP, positions_UP), valid_UP

    def step(self, tokens_B: Tensor, valid_BL: Tensor) -> Tensor:
        """Logits after one more token per row [B, V]; `valid_BL` includes the new column."""
        positions_B1 = valid_BL.sum(-1, keepdim=True) - 1
        return self._forward(tokens_B[:, None], valid_BL[:, None, :], positions_B1)

    def take_rows(self, rows: Tensor) -> None:
        """Go on with the given rows [R], which may repeat."""
        for layer in self.layers:
            layer.take_rows(rows)

    def _forward(self, tokens_BQ: Tensor, mask_BQL: Tensor, positions_BQ: Tensor) -> Tensor:
        logits_B1V = self.model(
            input_ids=tokens_BQ,
            attention_mask=mask_BQL[:, None],  # four dimensions: taken as it is
            position_ids=positions_BQ,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_B1V[:, -1]


@torch.inference_mode()
def decode(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    eos_ids: Sequence[int],
    at_work: Callable[[int], None] = lambda rows: None,
) -> list[Response]:
    """Sample a response to each request, all in one batch, in the order of the requests.

    `at_work` is told, token by token, how many responses have not ended. Raises NotFinite if the
    model's logits are not finite.
    """
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    longest = max(len(prompt.token_ids) for prompt in prompts)
    decoder = Decoder(model, longest + sampling.max_tokens)
    device, shape = decoder.device, (len(requests), sampling.max_tokens)
    tokens_NT = torch.zeros(shape, dtype=torch.int64, device=device)
    logprobs_NT = torch.zeros(shape, dtype=torch.float32, device=device)
    uniforms_NT = _uniforms(requests, sampling).to(device)
    eos = torch.tensor(eos_ids, device=device)

    logits, valid = decoder.prefill(prompts)
    owner = {prompt: row for row, prompt in enumerate(prompts)}
    rows = torch.tensor([owner[request.prompt] for request in requests], device=device)
    decoder.take_rows(rows)
    logits, valid = logits[rows], valid[rows]

    live = torch.arange(len(requests), device=device)  # the request of each row of the batch
    ended = torch.zeros_like(live, dtype=torch.bool)
    for t in range(sampling.max_tokens):
        tokens, logprobs = choose_tokens(logits, sampling.temperature, uniforms_NT[live, t])
        tokens_NT[live, t], logprobs_NT[live, t] = tokens, logprobs
        ended |= torch.isin(tokens, eos)
        still_going = int((~ended).sum())
        if still_going == 0 or t + 1 == sampling.max_tokens:
            break
        at_work(still_going)
        if 2 * still_going <= len(ended):
            rows = (~ended).nonzero()[:, 0]
            decoder.take_rows(rows)
            live, ended, tokens, valid = live[rows], ended[rows], tokens[rows], valid[rows]
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
        logits = decoder.step(tokens, valid)
    if not bool(logprobs_NT.isfinite().all()):
        raise NotFinite(
            "the rollout model's logits are not finite; the weights it was given are broken "
            "(look at policy/grad_norm of the last steps, lower policy.lr)"
        )
    return _responses(tokens_NT, logprobs_NT, torch.isin(tokens_NT, eos))


def _uniforms(requests: Sequence[Request], sampling: Sampling) -> Tensor:
    """The random numbers of all requests, float64 [N, max_tokens]; greedy decoding needs none."""
    if sampling.temperature == 0:
        return torch.zeros(1, 1, dtype=torch.float64).expand(len(requests), sampling.max_tokens)
    return torch.stack(
        [
            uniforms(sampling.seed, request.prompt.prompt_id, request.sample, sampling.max_tokens)
            for request in requests
        ]
    )


def _responses(tokens_NT: Tensor, logprobs_NT: Tensor, ends_NT: Tensor) -> list[Response]:
    """Cut each row behind its first end-of-sequence token."""
    stopped = ends_NT.any(-1)
    lengths = torch.where(stopped, ends_NT.int().argmax(-1) + 1, tokens_NT.shape[1])
    return [
        Response(tuple(tokens[:length]), tuple(logprobs[:length]), stop)
        for tokens, logprobs, length, stop in zip(
            tokens_NT.tolist(),
            logprobs_NT.tolist(),
            lengths.tolist(),
            stopped.tolist(),
            strict=True,
        )
    ]
