"""From messages to tokens: the tokenizer with its chat template, and the paper's prompt texts.

A prompt ends with the template's opening of an assistant turn; the policy goes on from there. For
supervised fine-tuning each assistant turn is cut out as the difference between two such encodings,
the conversation up to its opening and up to its end, so that whatever the template writes is
trained exactly where the policy will write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_prime.data.rows import Row, RowError, field, one_of
from megatron_prime.errors import RunError

Template = Literal["plain", "prime"]

# The paper's texts, to the letter (arXiv 2502.01456, appendix; Eurus-2-RL-Data).
PRIME_SYSTEM_PROMPT = """
When tackling complex reasoning tasks, you have access to the following actions. Use them as needed to progress through your thought process.

[ASSESS]

[ADVANCE]

[VERIFY]

[SIMPLIFY]

[SYNTHESIZE]

[PIVOT]

[OUTPUT]

You should strictly follow the format below:

[ACTION NAME]

# Your action step 1

# Your action step 2

# Your action step 3

...

Next action: [NEXT ACTION NAME]
"""  # noqa: E501
MATH_SUFFIX = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"
CODE_SUFFIX = (
    "\n\nWrite Python code to solve the problem. Present the code in \n"
    "```python\nYour code\n```\nat the end."
)
SUFFIXES = {"math": MATH_SUFFIX, "code": CODE_SUFFIX}
ROLES = ("system", "user", "assistant")


class TokenizerError(RunError, ValueError):
    """A tokenizer that can't serve a chat run."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this project uses."""

    chat_template: Any
    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, Any]  # by id; `special`: no text, a mark of the template

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        return_dict: bool,
        tokenize: bool = True,
    ) -> Any:
        """Token ids of a conversation; or its text, if it is not to be tokenized."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint; raises TokenizerError as `check_tokenizer`."""
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(directory)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer) -> int:
    """The EOS token's id; TokenizerError unless there are one and a chat template."""
    if not tokenizer.chat_template:
        raise TokenizerError(
            "found a tokenizer without a chat template; set `chat_template` in the checkpoint's"
            " tokenizer_config.json, or point model.hf at a chat model"
        )
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            "found a tokenizer without an end-of-sequence token, so that no response could end;"
            " set `eos_token` in the checkpoint's tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def parse_messages(row: Row, name: str) -> list[Message]:
    """The messages in `row[name]`, a list of {role, content}; RowError for anything else."""
    messages = []
    for position, item in enumerate(field(row, name, list)):
        try:
            if not isinstance(item, dict):
                raise RowError(f"found {item!r}, wanted an object with role and content")
            messages.append(Message(one_of(item, "role", ROLES), field(item, "content", str)))
        except RowError as error:
            raise RowError(f"{name}[{position}]: {error}") from error
    return messages


def build_messages(messages: Sequence[Message], ability: str, template: Template) -> list[Message]:
    """The messages that the policy is shown.

    `plain` leaves them as they are. `prime` makes the paper's system prompt the only system
    message, in front, and ends the last user message with the suffix of the ability unless it
    ends so already.
    """
    if template == "plain":
        return list(messages)
    system = Message("system", PRIME_SYSTEM_PROMPT)
    built = [system, *(message for message in messages if message.role != "system")]
    suffix = SUFFIXES[ability]
    last = max((i for i, message in enumerate(built) if message.role == "user"), default=None)
    if last is None:
        raise RowError("found no user message, wanted one to carry the suffix of the ability")
    if not built[last].content.rstrip().endswith(suffix.strip()):
        built[last] = replace(built[last], content=built[last].content + suffix)
    return built


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of the messages and of the opening of an assistant turn.

    Raises TokenizerError as `check_tokenizer`, RowError if the template refuses the messages.
    """
    return _encode(tokenizer, messages, add_generation_prompt=True)


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids of a conversation and a mask of those to be learnt, of the same length.

    Learnt is what the assistant writes, up to and including the EOS token of each turn. The
    sequence ends with a learnt EOS token: one is added if the template writes none, and what it
    writes behind it is dropped. Raises TokenizerError as `check_tokenizer`; RowError if the first
    message is the assistant's or the last is not, or if the template refuses the messages, rewrites
    earlier turns, or leaves out some of what the assistant says. What it adds to that is its way of
    writing, and learnt; blanks at the ends it may take away.
    """
    eos = check_tokenizer(tokenizer)
    roles = [message.role for message in messages]
    if not roles or roles[0] == "assistant" or roles[-1] != "assistant":
        raise RowError(f"found the roles {roles}, wanted others first and the assistant last")
    ids: tuple[int, ...] = ()
    mask: list[bool] = []
    for position in (i for i, role in enumerate(roles) if role == "assistant"):
        opening = encode_prompt(tokenizer, messages[:position])
        whole = _encode(tokenizer, messages[: position + 1], add_generation_prompt=False)
        if opening[: len(ids)] != ids or whole[: len(opening)] != opening:
            raise RowError(
                f"messages[{position}]: found a chat template that rewrites what stands before this"
                " assistant turn, wanted one that only appends; split the conversation there"
            )
        _check_turn(tokenizer, messages, position)
        turn = whole[len(opening) :]
        learnt = turn.index(eos) + 1 if eos in turn else len(turn)
        unlearnt = len(turn) - learnt
        mask += [False] * (len(opening) - len(ids)) + [True] * learnt + [False] * unlearnt
        ids = whole
    ids = ids[: len(ids) - unlearnt]
    mask = mask[: len(ids)]
    return (ids, tuple(mask)) if ids[-1] == eos else ((*ids, eos), (*mask, True))


def encode_answer(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt and of `text` as the assistant's answer to it, with its EOS token.

    These are the tokens with which a policy would have given that answer and ended: the text as it
    is, not as the template would write it. Raises as `encode_prompt`, and RowError for a text with
    special tokens in it; earlier answers among the `messages` belong to the prompt.
    """
    eos = check_tokenizer(tokenizer)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    special = {eos, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    if (inside := next((token for token in ids if token in special), None)) is not None:
        raise RowError(
            f"found the special token {_token(tokenizer, inside)} in a response, wanted text: it "
            "would end the response, or be none of its words"
        )
    return encode_prompt(tokenizer, messages), (*ids, eos)


def _check_turn(tokenizer: Tokenizer, messages: Sequence[Message], position: int) -> None:
    """RowError unless the template writes down all that the assistant says, up to the end."""
    said = messages[position].content.strip()
    eos = check_tokenizer(tokenizer)
    if eos in tokenizer.encode(said, add_special_tokens=False):
        raise RowError(
            f"messages[{position}]: found {_token(tokenizer, eos)} in what the assistant says, "
            "which would end the turn there"
        )
    opening = _render(tokenizer, messages[:position], add_generation_prompt=True)
    whole = _render(tokenizer, messages[: position + 1], add_generation_prompt=False)
    if said not in whole[len(opening) :]:
        raise RowError(
            f"messages[{position}]: found a chat template that leaves out some of what the "
            "assistant says (its <think>…</think>?), so that it would not be learnt; set a "
            "chat_template in tokenizer_config.json that writes all of it, or take that out of the "
            "row"
        )


def _token(tokenizer: Tokenizer, token: int) -> str:
    return repr(tokenizer.decode([token], skip_special_tokens=False))


def _encode(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool
) -> tuple[int, ...]:
    check_tokenizer(tokenizer)
    return tuple(_apply(tokenizer, messages, add_generation_prompt))


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool
) -> str:
    return str(_apply(tokenizer, messages, add_generation_prompt, tokenize=False))


def _apply(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, **more: bool
) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            [asdict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            **more,
        )
    except TemplateError as error:
        raise RowError(f"the chat template refuses the messages: {error}") from error
