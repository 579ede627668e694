import re

import pytest
from byte_tokenizer import CHATML

from megatron_prime.data import chat
from megatron_prime.data.chat import (
    CODE_SUFFIX,
    MATH_SUFFIX,
    PRIME_SYSTEM_PROMPT,
    Message,
    TokenizerError,
    build_messages,
    encode_answer,
    encode_conversation,
    encode_prompt,
    load_tokenizer,
)
from megatron_prime.data.rows import RowError

USER = Message("user", "What is 1+1?")


def learnt(tokenizer, ids, mask):
    """The learnt stretches of a conversation, as text."""
    assert len(ids) == len(mask)
    stretches, open_ = [], False
    for token, learn in zip(ids, mask, strict=True):
        if learn:
            stretches = [*stretches, []] if not open_ else stretches
            stretches[-1].append(token)
        open_ = learn
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_the_papers_system_prompt_to_the_letter():
    actions = ["ASSESS", "ADVANCE", "VERIFY", "SIMPLIFY", "SYNTHESIZE", "PIVOT", "OUTPUT"]
    wanted = (
        "\nWhen tackling complex reasoning tasks, you have access to the following actions. Use "
        "them as needed to progress through your thought process.\n\n"
        + "".join(f"[{action}]\n\n" for action in actions)
        + "You should strictly follow the format below:\n\n[ACTION NAME]\n\n"
        + "".join(f"# Your action step {i}\n\n" for i in (1, 2, 3))
        + "...\n\nNext action: [NEXT ACTION NAME]\n"
    )
    assert wanted == PRIME_SYSTEM_PROMPT


def test_prime_sets_the_system_prompt_and_appends_the_suffix_once():
    wanted = [Message("system", PRIME_SYSTEM_PROMPT), Message("user", "What is 1+1?" + MATH_SUFFIX)]
    assert build_messages([USER], "math", "prime") == wanted
    assert build_messages([Message("system", "Be kind."), USER], "math", "prime") == wanted
    assert build_messages(wanted, "math", "prime") == wanted
    assert wanted[1].content.endswith("LaTex format: \\boxed{Your answer}")


def test_prime_asks_for_code_in_the_last_user_message():
    messages = [USER, Message("assistant", "2"), Message("user", "Print it.")]
    built = build_messages(messages, "code", "prime")
    assert built[1:3] == messages[:2]
    assert built[3].content == "Print it." + CODE_SUFFIX
    assert built[3].content.endswith("\n```python\nYour code\n```\nat the end.")


def test_plain_leaves_messages_alone():
    messages = [Message("system", "Be kind."), USER]
    assert build_messages(messages, "math", "plain") == messages


def test_a_prompt_ends_with_the_opening_of_the_assistant_turn(tokenizer):
    ids = encode_prompt(tokenizer, [USER])
    assert type(ids) is tuple
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_conversation_learns_each_turn_with_its_end(tokenizer):
    turns = [
        Message("system", "S"),
        USER,
        Message("assistant", "2"),
        Message("user", "Sure?"),
        Message("assistant", "Yes."),
    ]
    ids, mask = encode_conversation(tokenizer, turns)
    assert learnt(tokenizer, ids, mask) == ["2<|im_end|>", "Yes.<|im_end|>"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>"
    )
    prompt = encode_prompt(tokenizer, turns[:4])
    assert ids[: len(prompt)] == prompt, "it must go on exactly where a rollout would"


def test_an_end_of_sequence_token_is_added_where_the_template_has_none(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    ids, mask = encode_conversation(tokenizer, [USER, Message("assistant", "2")])
    assert learnt(tokenizer, ids, mask) == ["2<|im_end|>\n<|endoftext|>"]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }};"
        "{% endif %}{% endfor %}"
    )
    short = [USER, Message("assistant", "2")]
    ids, mask = encode_conversation(tokenizer, short)
    assert learnt(tokenizer, ids, mask) == ["2;<|im_end|>"]
    with pytest.raises(RowError, match=r"messages\[3\].*rewrites"):
        encode_conversation(tokenizer, [*short, USER, Message("assistant", "2")])


THINKING = "<think>1 and 1</think>It is 2. "
CONTENT = "{{ m['content'] }}"
LAST = "{{ m['content'].split('</think>')[-1] }}"  # what reasoning models' templates keep


@pytest.mark.parametrize(
    "written",
    [CONTENT, LAST, "{{ m['content'] | trim }}", "<think></think>{{ m['content'] }}"],
)
def test_an_answer_has_its_own_tokens_whatever_the_template_makes_of_it(make_tokenizer, written):
    tokenizer = make_tokenizer(CHATML.replace(CONTENT, written))
    prompt, answer = encode_answer(tokenizer, [USER], THINKING)
    assert prompt == encode_prompt(tokenizer, [USER])
    assert tokenizer.decode(answer) == THINKING + "<|im_end|>"


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_an_answer_with_a_special_token_is_refused(tokenizer, mark):
    with pytest.raises(RowError, match=f"the special token '{re.escape(mark)}' in a response"):
        encode_answer(tokenizer, [USER], f"It is{mark} 2.")


def test_what_a_template_adds_or_trims_is_learnt_and_what_it_drops_is_refused(make_tokenizer):
    turns = [USER, Message("assistant", THINKING)]
    for written, wanted in (
        ("{{ m['content'] | trim }}", THINKING.strip()),
        ("<think></think>{{ m['content'] }}", "<think></think>" + THINKING),
    ):
        changed = make_tokenizer(CHATML.replace(CONTENT, written))
        # Only what the assistant says is checked, so the user's turn may be written so, too.
        ids, mask = encode_conversation(changed, turns)
        assert learnt(changed, ids, mask) == [wanted + "<|im_end|>"]
    dropping = make_tokenizer(CHATML.replace(CONTENT, LAST))
    with pytest.raises(RowError, match=r"messages\[1\]: found a chat template that leaves out"):
        encode_conversation(dropping, turns)
    assert encode_conversation(dropping, [USER, Message("assistant", "It is 2.")])


def test_a_turn_that_would_end_early_is_refused(tokenizer):
    with pytest.raises(
        RowError, match=r"messages\[1\]: found '<\|im_end\|>' in what the assistant"
    ):
        encode_conversation(tokenizer, [USER, Message("assistant", "It<|im_end|> is 2.")])


@pytest.mark.parametrize("roles", [[], ["user"], ["assistant"], ["user", "assistant", "user"]])
def test_a_conversation_ends_with_the_assistant_and_does_not_begin_so(tokenizer, roles):
    with pytest.raises(RowError, match="the assistant last"):
        encode_conversation(tokenizer, [Message(role, "x") for role in roles])


def test_what_the_template_refuses_is_the_rows_fault(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('no system messages') }}")
    with pytest.raises(RowError, match="refuses the messages: no system messages"):
        encode_prompt(tokenizer, [USER])


def test_a_tokenizer_needs_a_chat_template_and_an_end(make_tokenizer):
    with pytest.raises(TokenizerError, match="without a chat template; set `chat_template`"):
        encode_prompt(make_tokenizer(chat_template=None), [USER])
    with pytest.raises(TokenizerError, match="without an end-of-sequence token"):
        encode_prompt(make_tokenizer(eos_token=None), [USER])


def test_tokenizers_are_loaded_from_a_directory(make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert encode_prompt(loaded, [USER]) == encode_prompt(make_tokenizer(), [USER])
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "bad")
    with pytest.raises(TokenizerError):
        load_tokenizer(tmp_path / "bad")


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "prompt: found None, wanted a non-empty list"),
        ("1+1", "prompt: found '1\\+1', wanted a non-empty list"),
        ([], "prompt: found \\[\\], wanted"),
        (["1+1"], "prompt\\[0\\]: found '1\\+1', wanted an object"),
        ([{"role": "user"}], "prompt\\[0\\]: content: found nothing"),
        ([{"role": "tool", "content": "x"}], "prompt\\[0\\]: role: found 'tool', wanted 'system'"),
    ],
)
def test_malformed_messages(messages, problem):
    with pytest.raises(RowError, match=problem):
        chat.parse_messages({"prompt": messages}, "prompt")
