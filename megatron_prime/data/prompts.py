"""Training prompts: read, checked and tokenized once, then an endless stream to be resumed.

Rows have the fields of Eurus-2-RL-Data. The order of an epoch is a function of seed and epoch
number alone, so that a few numbers in a checkpoint say exactly which prompts come next, on every
rank.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prime.data.chat import (
    Template,
    Tokenizer,
    build_messages,
    check_tokenizer,
    encode_prompt,
    parse_messages,
)
from megatron_prime.data.rows import DataError, Row, RowError, field, one_of, read_rows
from megatron_prime.types import Prompt

ABILITIES = ("math", "code")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a file, in its order."""

    prompts: tuple[Prompt, ...]
    dropped_long: int  # rows left out because their prompt is too long


def load_prompts(
    path: Path, tokenizer: Tokenizer, template: Template, max_prompt_length: int
) -> PromptSet:
    """Read the prompts of a .jsonl or .parquet file; `prompt_id` is the number of the row, from 0.

    A row has `data_source`, `prompt` (messages, the last one the user's), `ability` and
    `reward_model` with style "rule" and `ground_truth`; other fields are ignored. Prompts of more
    than `max_prompt_length` tokens are counted and dropped. Raises DataError for a file without
    usable prompts and for all malformed rows at once, TokenizerError for a tokenizer without chat
    template or EOS token.
    """
    check_tokenizer(tokenizer)

    def parse(number: int, row: Row) -> Prompt:
        return parse_prompt(number, row, tokenizer, template)

    prompts = read_rows(path, parse)
    fitting = tuple(prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_length)
    if not fitting:
        raise DataError(
            f"{path}: found {len(prompts)} prompts, the shortest of"
            f" {min(len(prompt.token_ids) for prompt in prompts)} tokens, wanted at most"
            f" {max_prompt_length}; raise data.max_prompt_length"
        )
    return PromptSet(fitting, len(prompts) - len(fitting))


def parse_prompt(number: int, row: Row, tokenizer: Tokenizer, template: Template) -> Prompt:
    """A row with the fields that `load_prompts` names; RowError for another."""
    messages = parse_messages(row, "prompt")
    if messages[-1].role != "user":
        raise RowError(f"prompt: found {messages[-1].role!r} as the last role, wanted 'user'")
    ability = one_of(row, "ability", ABILITIES)
    reward_model = field(row, "reward_model", dict)
    try:
        one_of(reward_model, "style", ("rule",))
        ground_truth = field(reward_model, "ground_truth", str)
    except RowError as error:
        raise RowError(f"reward_model.{error}") from error
    return Prompt(
        prompt_id=number,
        token_ids=encode_prompt(tokenizer, build_messages(messages, ability, template)),
        ground_truth=ground_truth,
        ability=ability,
        data_source=field(row, "data_source", str),
    )


class PromptStream:
    """Endless prompts, each once per epoch, shuffled anew in every epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("found no prompts, wanted at least one")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._fingerprint = fingerprint(self._prompts)
        self._put_back: deque[Prompt] = deque()
        self._start_epoch(0)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts: first those put back, then the epoch's and the next epochs'.

        They all differ, for two equal prompts would be answered alike: one that comes up again
        (where an epoch begins, or after `put_back`) waits for the next take. Raises DataError if
        there are fewer than `count` prompts.
        """
        if count > len(self._prompts):
            raise DataError(
                f"found {len(self._prompts)} prompts, wanted {count} different ones for a round;"
                " lower rollout.prompts_per_round (or rollout.prompts_per_step), or bring more data"
            )
        taken: dict[int, Prompt] = {}
        again: list[Prompt] = []
        while len(taken) < count:
            prompt = self._put_back.popleft() if self._put_back else self._next()
            if prompt.prompt_id in taken:
                again.append(prompt)
            else:
                taken[prompt.prompt_id] = prompt
        self.put_back(again)
        return list(taken.values())

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Let `prompts` come first in the next `take`, in this order."""
        self._put_back.extendleft(reversed(prompts))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain values that JSON can hold."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "put_back": [prompt.prompt_id for prompt in self._put_back],
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; DataError if it had other prompts or another seed."""
        if (state["prompts"], state["fingerprint"]) != (len(self._prompts), self._fingerprint):
            raise DataError(
                f"found a checkpoint of a run on {state['prompts']} prompts (fingerprint"
                f" {state['fingerprint']}), wanted the present {len(self._prompts)} (fingerprint"
                f" {self._fingerprint}); restore data.train, data.template and"
                " data.max_prompt_length, or start a new run.folder"
            )
        if state["seed"] != self._seed:
            raise DataError(
                f"found a checkpoint of a run with run.seed = {state['seed']}, wanted"
                f" {self._seed}; restore run.seed, or start a new run.folder"
            )
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        self._put_back = deque(by_id[prompt_id] for prompt_id in state["put_back"])
        self._start_epoch(state["epoch"], state["cursor"])

    def _next(self) -> Prompt:
        if self._cursor == len(self._order):
            self._start_epoch(self._epoch + 1)
        self._cursor += 1
        return self._prompts[self._order[self._cursor - 1]]

    def _start_epoch(self, epoch: int, cursor: int = 0) -> None:
        """Order `epoch` by random keys: only `random()` is the same in all Python versions."""
        keys = random.Random(f"{self._seed}/{epoch}")
        self._order = sorted(range(len(self._prompts)), key=lambda _: keys.random())
        self._epoch = epoch
        self._cursor = cursor


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that change with any prompt's tokens, ground truth or row."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(repr((prompt.prompt_id, prompt.ability, prompt.ground_truth)).encode())
        digest.update(array("q", prompt.token_ids))
    return digest.hexdigest()
