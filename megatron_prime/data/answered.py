"""Rows with a prompt and responses to it, as `train_prm` and `score` read them.

    {"prompt": "…" or [messages], "responses": ["…", …], "labels": [1, 0, …]}
    {"messages": [… , {"role": "assistant", "content": "…"}], "label": 1}
    a line of a run's rollouts/                   (labels: its outcome rewards)

A label is a number in [0, 1]; only `train_prm` needs one. `data.template` makes the prompt, as it
does for the policy, for the `ability` of the row, "math" unless it is "code". Texts get the tokens
with which a policy would have written them, and end with its EOS token; rollouts keep their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_prime.data.chat import (
    Message,
    Template,
    Tokenizer,
    build_messages,
    encode_answer,
    parse_messages,
)
from megatron_prime.data.prompts import ABILITIES
from megatron_prime.data.rows import (
    SHOWN_PROBLEMS,
    DataError,
    Row,
    RowError,
    field,
    malformed,
    one_of,
    scan_rows,
)
from megatron_prime.types import VerifiedGroup

_GROUP = TypeAdapter(VerifiedGroup)


@dataclass(frozen=True, slots=True)
class Answered:
    """A row: a prompt, and at least one response to it."""

    place: str  # where it stands: "line 3"
    id: str | None  # what the row calls itself
    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]  # token ids
    labels: tuple[float, ...] | None  # one for each response


def read_answered(
    source: Path, tokenizer: Tokenizer, template: Template, labelled: bool, vocab_size: int
) -> list[Answered]:
    """All rows of a .jsonl or .parquet file, or of all step_*.jsonl of a folder.

    `vocab_size`: the model's, which recorded tokens must be below; and `tokenizer` must read in
    them what the run that recorded them did.
    Raises DataError for all malformed rows at once (with `labelled`, rows without labels are), and
    where there are none at all.
    """
    files = sorted(source.glob("step_*.jsonl")) if source.is_dir() else [source]
    rows: list[Answered] = []
    problems: list[str] = []
    count = 0
    for file in files:
        for _, place, row in scan_rows(file):
            where = f"{file.name}, {place}" if source.is_dir() else place
            try:
                if isinstance(row, RowError):
                    raise row
                if "rollouts" in row:
                    rows.append(_of_rollouts(where, row, tokenizer, vocab_size))
                else:
                    rows.append(_parse(where, row, tokenizer, template, labelled))
            except RowError as error:  # survived until all other rows are looked at
                count += 1
                if count <= SHOWN_PROBLEMS:
                    problems.append(f"  {where}: {error}")
    if count:
        raise malformed(source, problems, count)
    if not rows:
        wanted = "step_*.jsonl with rollouts" if source.is_dir() else "at least one row"
        raise DataError(f"{source} is empty; wanted {wanted}")
    return rows


def _parse(
    place: str, row: Row, tokenizer: Tokenizer, template: Template, labelled: bool
) -> Answered:
    messages, texts = _texts(row)
    labels = _labels(row, len(texts))
    if labelled and labels is None:
        raise RowError("labels: found nothing, wanted a number in [0, 1] for each response")
    ability = one_of(row, "ability", ABILITIES) if "ability" in row else ABILITIES[0]
    asked = build_messages(messages, ability, template)
    encoded = [encode_answer(tokenizer, asked, text) for text in texts]
    responses = tuple(response for _, response in encoded)
    name = row.get("id")
    return Answered(place, None if name is None else str(name), encoded[0][0], responses, labels)


def _texts(row: Row) -> tuple[list[Message], list[str]]:
    """The messages of the prompt, and the responses."""
    if "responses" not in row and "messages" in row:
        *messages, last = parse_messages(row, "messages")
        if last.role != "assistant" or not messages:
            raise RowError(
                f"messages: found {last.role!r} as the last role of {len(messages) + 1} messages, "
                "wanted a prompt and the 'assistant' behind it, or responses in a field of theirs"
            )
        return messages, [last.content]
    texts = field(row, "responses", list)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise RowError(f"responses[{number}]: found {text!r}, wanted a non-empty str")
    if isinstance(row.get("prompt"), str):
        return [Message("user", field(row, "prompt", str))], texts
    messages = parse_messages(row, "messages" if "messages" in row else "prompt")
    if messages[-1].role == "assistant":
        raise RowError("messages: found 'assistant' as the last role, wanted it in responses")
    return messages, texts


def _labels(row: Row, count: int) -> tuple[float, ...] | None:
    labels = row.get("labels", [row["label"]] if "label" in row else None)
    if labels is None:
        return None
    if not isinstance(labels, list) or len(labels) != count:
        raise RowError(f"labels: found {_shown(labels)}, wanted a list of {count}, as responses")
    _check_labels("labels", labels)
    return tuple(map(float, labels))


def _check_labels(name: str, labels: Sequence[Any]) -> None:
    for number, label in enumerate(labels):
        # NaN fails the comparison, too.
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise RowError(f"{name}[{number}]: found {label!r}, wanted a number from 0 to 1")


def _of_rollouts(place: str, row: Row, tokenizer: Tokenizer, vocab_size: int) -> Answered:
    try:
        group = _GROUP.validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RowError(
            f"found rollouts that no run wrote ({where}: {first['msg']}); wanted a verified group"
        ) from error
    responses = tuple(rollout.response_ids for rollout in group.rollouts)
    if not responses or len(responses) != len(group.outcome_rewards) or not all(responses):
        raise RowError(
            f"found {len(responses)} rollouts with {len(group.outcome_rewards)} outcome_rewards, "
            "wanted as many, and no empty response"
        )
    _check_labels("outcome_rewards", group.outcome_rewards)
    _check_tokens(group, tokenizer, vocab_size)
    name = str(group.prompt.prompt_id)
    return Answered(place, name, group.prompt.token_ids, responses, group.outcome_rewards)


def _check_tokens(group: VerifiedGroup, tokenizer: Tokenizer, vocab_size: int) -> None:
    """RowError for tokens of another vocabulary: the models would take them for other words."""
    recorded = (group.prompt.token_ids, *(rollout.response_ids for rollout in group.rollouts))
    for ids in recorded:
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            raise RowError(
                f"found the token {wrong[0]}, wanted tokens below {vocab_size}, the vocab_size of "
                "model.hf; take the model of the run that wrote the rollouts, or one of its family"
            )
    for number, rollout in enumerate(group.rollouts):
        text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        if text != rollout.text:
            raise RowError(
                f"rollouts[{number}]: found tokens that the tokenizer of model.hf reads as "
                f"{_shown(text)}, and that were recorded as {_shown(rollout.text)}; take the model "
                "of the run that wrote the rollouts, or one of its family"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
