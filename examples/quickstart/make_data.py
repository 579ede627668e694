"""Make the quickstart's task: add five digits in a chain, taught by a sloppy demonstrator.

    python examples/quickstart/make_data.py --out DIR [--seed N] [--train N] [--test N] [--sft N]

A problem `8+7+6+5+9=` is solved by `8+7=15,15+6=21,21+5=26,26+9=35,\\boxed{35}`. In the traces for
supervised fine-tuning each carry is forgotten half of the time and the trace goes on from the wrong
total: the fine-tuned model knows every step and gets few chains right, and that PRIME mends.

DIR gets train.jsonl and test.jsonl (fields of Eurus-2-RL-Data), sft.jsonl (chat messages), no
problem in two of them, and model/: a small Qwen2's config.json and a tokenizer of characters.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TERMS = 5
PROBLEMS = 9**TERMS  # every chain of TERMS digits from 1 to 9
FORGOTTEN_CARRIES = 0.5  # share of carries that the demonstrator drops

VOCABULARY_SIZE = 64
PAD, EOS = "<pad>", "<eos>"
# Characters in byte-level spelling, Ġ for a space and Ċ for a line break; others can't be encoded.
CHARACTERS = "0123456789+-=,.\\{}()ĠĊabcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def digits_of(problem: int) -> list[int]:
    """The TERMS digits of problem number `problem`."""
    return [problem // 9**place % 9 + 1 for place in range(TERMS)]


def question(digits: list[int]) -> str:
    """The prompt, such as `8+7+6=`."""
    return "+".join(map(str, digits)) + "="


def trace(digits: list[int], forgotten_carries: float, rng: random.Random) -> str:
    """The worked solution; each carry of the ones digit is dropped with the given probability."""
    total, steps = digits[0], []
    for digit in digits[1:]:
        result = total + digit
        if total % 10 + digit >= 10 and rng.random() < forgotten_carries:
            result -= 10
        steps.append(f"{total}+{digit}={result}")
        total = result
    return ",".join([*steps, rf"\boxed{{{total}}}"])


def prompt_row(digits: list[int], split: str, index: int) -> dict[str, object]:
    """A row of train.jsonl or test.jsonl."""
    return {
        "data_source": "chain_addition",
        "prompt": [{"role": "user", "content": question(digits)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(sum(digits))},
        "extra_info": {"split": split, "index": index},
    }


def conversation_row(digits: list[int], rng: random.Random) -> dict[str, object]:
    """A row of sft.jsonl."""
    answer = trace(digits, FORGOTTEN_CARRIES, rng)
    return {
        "messages": [
            {"role": "user", "content": question(digits)},
            {"role": "assistant", "content": answer},
        ]
    }


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(directory: Path) -> None:
    """Write the model's shape and its tokenizer: byte-level BPE without merges, as Qwen2's is."""
    vocabulary = [PAD, EOS, *CHARACTERS]
    vocabulary += [f"<unused{i}>" for i in range(VOCABULARY_SIZE - len(vocabulary))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "hidden_act": "silu",
        "vocab_size": VOCABULARY_SIZE,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "pad_token_id": vocabulary.index(PAD),
        "eos_token_id": vocabulary.index(EOS),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Write the files; test.jsonl comes last, so where it is the others are too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="chooses problems and traces")
    parser.add_argument("--train", type=int, default=4000, help="problems for PRIME")
    parser.add_argument("--test", type=int, default=200, help="held-out problems")
    parser.add_argument("--sft", type=int, default=15360, help="traces for fine-tuning")
    options = parser.parse_args(arguments)
    if (wanted := options.train + options.test + options.sft) > PROBLEMS:
        parser.error(f"found --train + --test + --sft = {wanted}, wanted at most {PROBLEMS}")
    rng = random.Random(options.seed)
    problems = [digits_of(problem) for problem in rng.sample(range(PROBLEMS), wanted)]
    train, rest = problems[: options.train], problems[options.train :]
    test, sft = rest[: options.test], rest[options.test :]
    write_model(options.out / "model")
    write_rows(options.out / "sft.jsonl", (conversation_row(digits, rng) for digits in sft))
    for name, split in (("train", train), ("test", test)):
        rows = (prompt_row(digits, name, index) for index, digits in enumerate(split))
        write_rows(options.out / f"{name}.jsonl", rows)
    print(f"{options.out}: {len(train)} train, {len(test)} test, {len(sft)} sft problems; model/")


if __name__ == "__main__":
    main()
