"""Make the quickstart's task: add five digits in a chain, taught by a sloppy demonstrator.

    python examples/quickstart/make_data.py --out DIR [--seed N] [--train N] [--test N] [--sft N]
        [--skills chain,linear,modular,program] [--difficulty N]

A problem `8+7+6+5+9=` is solved by `8+7=15,15+6=21,21+5=26,26+9=35,\\boxed{35}`. In the traces for
supervised fine-tuning each carry is forgotten half of the time and the trace goes on from the wrong
total: the fine-tuned model knows every step and gets few chains right, and that PRIME mends.

DIR gets train.jsonl and test.jsonl (fields of Eurus-2-RL-Data), sft.jsonl (chat messages), no
problem in two of them, and model/: a small Qwen2's config.json and a tokenizer of characters.

Other `--skills` are mixed in equal shares: linear equations, modular arithmetic, programs with
tests (`megatron_prime/prepare/skills.py`). `--difficulty` 2, 3, … asks for more terms, larger
numbers, more steps. Their prompts are longer and use more characters, so model/ gets a larger
vocabulary, and a run wants larger data.max_prompt_length, rollout.max_response_length and
sft.max_length.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_prime.prepare.skills import SKILLS, Exercise

FORGOTTEN_CARRIES = 0.5  # share of carries that the demonstrator drops

PAD, EOS = "<pad>", "<eos>"
# Characters in byte-level spelling, Ġ for a space and Ċ for a line break; others can't be encoded.
CHARACTERS = "0123456789+-=,.\\{}()ĠĊabcdefghijklmnopqrstuvwxyz"
ALL_CHARACTERS = "".join(map(chr, range(33, 127))) + "ĠĊ"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def terms_of(difficulty: int) -> int:
    """How many digits a chain adds: 5, 7, 9, …"""
    return 3 + 2 * difficulty


def digits_of(problem: int, terms: int) -> list[int]:
    """The digits, from 1 to 9, of chain number `problem` of 9 ** terms."""
    return [problem // 9**place % 9 + 1 for place in range(terms)]


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


def chains(rng: random.Random, difficulty: int, count: int, worked: int) -> list[Exercise]:
    """So many different chains, the last `worked` of them with a sloppy trace."""
    terms = terms_of(difficulty)
    if count > 9**terms:
        raise ValueError(f"found {count} problems, wanted at most {9**terms} of {terms} digits")
    problems = [digits_of(problem, terms) for problem in rng.sample(range(9**terms), count)]
    return [
        Exercise(
            "chain_addition",
            "math",
            question(digits),
            str(sum(digits)),
            trace(digits, FORGOTTEN_CARRIES, rng) if place >= count - worked else "",
        )
        for place, digits in enumerate(problems)
    ]


def mixed(skills: Sequence[str], rng: random.Random, difficulty: int, count: int) -> list[Exercise]:
    """So many different exercises, the skills in turn."""
    found: dict[str, Exercise] = {}
    tries = 0
    while len(found) < count:
        skill = SKILLS.get(skills[len(found) % len(skills)], one_chain)
        exercise = skill(rng, difficulty, FORGOTTEN_CARRIES)
        tries = 0 if exercise.question not in found else tries + 1
        found.setdefault(exercise.question, exercise)
        if tries > 1000:
            raise ValueError(
                f"found {len(found)} different problems of {exercise.data_source}, wanted {count}"
                " of all skills; raise --difficulty, or ask for fewer"
            )
    return list(found.values())


def one_chain(rng: random.Random, difficulty: int, slips: float) -> Exercise:
    """A chain as the other skills are drawn."""
    digits = [1 + int(rng.random() * 9) for _ in range(terms_of(difficulty))]
    worked = trace(digits, slips, rng)
    return Exercise("chain_addition", "math", question(digits), str(sum(digits)), worked)


def prompt_row(exercise: Exercise, split: str, index: int) -> dict[str, object]:
    """A row of train.jsonl or test.jsonl."""
    return {
        "data_source": exercise.data_source,
        "prompt": [{"role": "user", "content": exercise.question}],
        "ability": exercise.ability,
        "reward_model": {"style": "rule", "ground_truth": exercise.ground_truth},
        "extra_info": {"split": split, "index": index},
    }


def conversation_row(exercise: Exercise) -> dict[str, object]:
    """A row of sft.jsonl."""
    return {
        "messages": [
            {"role": "user", "content": exercise.question},
            {"role": "assistant", "content": exercise.worked},
        ]
    }


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(directory: Path, characters: str = CHARACTERS) -> None:
    """Write the model's shape and its tokenizer: byte-level BPE without merges, as Qwen2's is."""
    vocabulary = [PAD, EOS, *characters]
    vocabulary += [f"<unused{i}>" for i in range(-len(vocabulary) % 64)]
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
        "vocab_size": len(vocabulary),
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
    parser.add_argument("--skills", default="chain", help=f"of {', '.join(['chain', *SKILLS])}")
    parser.add_argument("--difficulty", type=int, default=1, help="from 1; longer and larger")
    options = parser.parse_args(arguments)
    skills = options.skills.split(",")
    if unknown := [skill for skill in skills if skill not in ("chain", *SKILLS)]:
        parser.error(f"found --skills {unknown}, wanted some of {['chain', *SKILLS]}")
    if options.difficulty < 1:
        parser.error(f"found --difficulty {options.difficulty}, wanted 1 or more")
    count = options.train + options.test + options.sft
    rng = random.Random(options.seed)
    try:
        if skills == ["chain"]:
            exercises = chains(rng, options.difficulty, count, options.sft)
        else:
            exercises = mixed(skills, rng, options.difficulty, count)
    except ValueError as error:
        parser.error(str(error))
    train, rest = exercises[: options.train], exercises[options.train :]
    test, sft = rest[: options.test], rest[options.test :]
    write_model(options.out / "model", CHARACTERS if skills == ["chain"] else ALL_CHARACTERS)
    write_rows(options.out / "sft.jsonl", map(conversation_row, sft))
    for name, split in (("train", train), ("test", test)):
        rows = (prompt_row(exercise, name, index) for index, exercise in enumerate(split))
        write_rows(options.out / f"{name}.jsonl", rows)
    print(f"{options.out}: {len(train)} train, {len(test)} test, {len(sft)} sft problems; model/")


if __name__ == "__main__":
    main()
