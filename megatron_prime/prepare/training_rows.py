"""The two kinds of training files: prompts for PRIME and conversations for supervised fine-tuning.

Both are measured with the tokenizer that the run will use, by the very functions that the run reads
them with (`data/chat.py`): what is kept here isn't dropped there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from megatron_prime.data.chat import (
    Message,
    Template,
    Tokenizer,
    build_messages,
    encode_conversation,
    encode_prompt,
)
from megatron_prime.data.rows import Row, RowError
from megatron_prime.prepare.golds import Grader, check_golds
from megatron_prime.prepare.items import Dropped, Item, drop
from megatron_prime.prepare.pipeline import Finish, Screen
from megatron_prime.prepare.rules import screen


def prompt_screen(grade: Grader, drop_yes_no: bool) -> Screen:
    """The rules of RL data: see `rules.py` and `golds.py`."""

    def screen_all(items: Sequence[Item]) -> Sequence[Item | Dropped]:
        return _graded([screen(item, drop_yes_no) for item in items], grade)

    return screen_all


def conversation_screen(grade: Grader) -> Screen:
    """SFT data needs no ground truth; where there is one, the solution must box it."""

    def screen_all(items: Sequence[Item]) -> Sequence[Item | Dropped]:
        return _graded(items, grade)

    return screen_all


def prompt_rows(tokenizer: Tokenizer, template: Template, max_tokens: int) -> Finish:
    """Items as rows of Eurus-2-RL-Data, in the messages of `template`."""

    def finish(item: Item, split: str) -> Row | Dropped:
        try:
            messages = build_messages(item.messages, item.ability, template)
            length = len(encode_prompt(tokenizer, messages))
        except RowError as error:  # counted with its reason
            return drop(item, "template", str(error))
        if length > max_tokens:
            return drop(item, "too_long", f"found {length} tokens, wanted at most {max_tokens}")
        return {
            "data_source": item.source,
            "prompt": [asdict(message) for message in messages],
            "ability": item.ability,
            "reward_model": {"style": "rule", "ground_truth": _truth(item)},
            "extra_info": {"split": split, "index": item.number, "file": item.file},
        }

    return finish


def conversation_rows(tokenizer: Tokenizer, template: Template, max_tokens: int) -> Finish:
    """Items as {"messages": [...]}, of which only what the assistant says is learnt."""

    def finish(item: Item, split: str) -> Row | Dropped:
        try:
            messages = build_messages(item.messages, item.ability, template)
            ids, mask = encode_conversation(tokenizer, messages)
        except RowError as error:  # counted with its reason
            return drop(item, "template", str(error))
        if len(ids) > max_tokens:
            return drop(item, "too_long", f"found {len(ids)} tokens, wanted at most {max_tokens}")
        if why := wrongly_learnt(tokenizer, messages, ids, mask):
            return drop(item, "template", why)
        return {
            "data_source": item.source,
            "messages": [asdict(message) for message in messages],
            "extra_info": {"split": split, "index": item.number, "file": item.file},
        }

    return finish


def wrongly_learnt(
    tokenizer: Tokenizer, messages: Sequence[Message], ids: Sequence[int], mask: Sequence[bool]
) -> str:
    """Where the tokens under the mask aren't what the assistant says; "" if they all are."""
    wanted = [m.content.strip() for m in messages if m.role == "assistant"]
    learnt = [
        tokenizer.decode(turn, skip_special_tokens=True).strip() for turn in _turns(ids, mask)
    ]
    for turn, (found, content) in enumerate(zip(learnt, wanted, strict=False)):
        if found != content:
            return f"turn {turn} would teach {found[-60:]!r}, wanted {content[-60:]!r}"
    if len(learnt) != len(wanted):
        return f"found {len(learnt)} turns to be learnt, wanted {len(wanted)}"
    return ""


def _turns(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """The runs of tokens under the mask."""
    turns: list[list[int]] = []
    for i, (token, learnt) in enumerate(zip(ids, mask, strict=True)):
        if learnt:
            if i == 0 or not mask[i - 1]:
                turns.append([])
            turns[-1].append(token)
    return turns


def _graded(found: Sequence[Item | Dropped], grade: Grader) -> Sequence[Item | Dropped]:
    """Those that are still in, held against their solutions; the order stays."""
    checked = iter(check_golds([item for item in found if isinstance(item, Item)], grade))
    return [next(checked) if isinstance(item, Item) else item for item in found]


def _truth(item: Item) -> str:
    """The ground truth; lines of stdin and stdout of a program become texts."""
    if item.ability != "code":
        return item.ground_truth
    tests = json.loads(item.ground_truth)
    if tests.get("fn_name") is None:
        for name in ("inputs", "outputs"):
            tests[name] = [v if isinstance(v, str) else "\n".join(v) for v in tests[name]]
    return json.dumps(tests)
