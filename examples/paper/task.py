"""The miniature's task: three machines in turn, taught by someone who remembers some of it wrongly.

    python examples/paper/task.py --out DIR [--seed N]

A machine is a letter, and a table that sends each digit to another one. A problem `BKT7=` starts
from 7 and applies B, K, T, B, K, T, … twelve times; its solution names each result,
`B3,K0.T8,B4;…\\boxed{5}`. One wrong step spoils the answer, and nothing but the answer is judged.
The demonstrator of the traces for fine-tuning is unsure of some of the table's entries: of such an
entry he knows one wrong result, always the same, and gives it with that entry's own probability,
often above a half. So the fine-tuned model is right and wrong as he is, and no general rule mends
it: which of two results is right, reinforcement has to find out entry by entry, from the answers.

DIR gets train.jsonl and test.jsonl (fields of Eurus-2-RL-Data), sft.jsonl (chat messages), no
problem in two of them, and model/: a small Qwen2's config.json and a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS = "<pad>", "<eos>"
KINDS = ("ABCDEFGH", "JKLMNOPQ", "STUVWXYZ")  # a problem has a machine of each, in this order
BOX = "\\boxed{"  # one token
HIDDEN, LAYERS, HEADS = 64, 2, 4  # of the model
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Task:
    """How hard it is."""

    steps: int = 12
    letters: int = 8  # machines of each kind
    marks: str = ",;."  # one of them, by chance, ends a step: it means nothing
    unsure: float = 0.5  # share of the entries that the demonstrator is unsure of
    lowest: float = 0.05  # of an unsure entry: least and largest probability of its wrong result
    highest: float = 0.6
    seed: int = 0  # which tables, entries and wrong results


Entry = tuple[str, int]  # a machine and the digit that goes in


@dataclass(frozen=True, slots=True)
class Machines:
    """The tables, and what the demonstrator takes for them."""

    right: dict[Entry, int]
    wrong: dict[Entry, int]
    slip: dict[Entry, float]  # how often he gives the wrong result


@dataclass(frozen=True, slots=True)
class Problem:
    """Three machines and a digit."""

    letters: str
    start: int

    @property
    def question(self) -> str:
        """The prompt."""
        return f"{self.letters}{self.start}="


def machines_of(task: Task) -> Machines:
    """The machines: the same for all problems; each sends two digits to different ones."""
    rng = random.Random(f"machines/{task.seed}")
    right: dict[Entry, int] = {}
    for letter in "".join(kind[: task.letters] for kind in KINDS):
        table = sorted(range(10), key=lambda _: rng.random())
        right |= {(letter, digit): table[digit] for digit in range(10)}
    wrong = {entry: (result + 1 + int(rng.random() * 9)) % 10 for entry, result in right.items()}
    unsure = sorted(right, key=lambda _: rng.random())[: round(task.unsure * len(right))]
    span = task.highest - task.lowest
    slip = dict.fromkeys(right, 0.0)
    slip |= {e: task.lowest + span * (i + 0.5) / len(unsure) for i, e in enumerate(unsure)}
    return Machines(right, wrong, slip)


def trace(
    problem: Problem, task: Task, machines: Machines, rng: random.Random | None = None
) -> str:
    """The right solution, or with `rng` the demonstrator's, who goes on from what he said."""
    digit, said = problem.start, []
    for step in range(task.steps):
        entry = (problem.letters[step % len(problem.letters)], digit)
        slips = rng is not None and rng.random() < machines.slip[entry]
        digit = machines.wrong[entry] if slips else machines.right[entry]
        mark = task.marks[0] if rng is None else rng.choice(task.marks)
        said.append(f"{entry[0]}{digit}{mark}")
    return "".join([*said, f"{BOX}{digit}}}"])


def first_wrong_step(problem: Problem, response: str, task: Task, machines: Machines) -> int | None:
    """Number, from 0, of the first step that does not follow from the one before; None if all do.

    A step is a letter, a digit and a mark; the box counts as the last one. What can't be read,
    is missing or too much, is wrong.
    """
    digit = problem.start
    for step in range(task.steps):
        letter = problem.letters[step % len(problem.letters)]
        digit = machines.right[letter, digit]
        said = response[3 * step : 3 * step + 3]
        if said[:2] != f"{letter}{digit}" or said[2:] not in tuple(task.marks):
            return step
    return None if response[3 * task.steps :] == f"{BOX}{digit}}}" else task.steps


def write_task(folder: Path, task: Task, train: int, test: int, sft: int) -> None:
    """Write the files; test.jsonl comes last, so where it is the others are too."""
    rng, machines = random.Random(f"problems/{task.seed}"), machines_of(task)
    drawn = product(*(kind[: task.letters] for kind in KINDS), range(10))
    problems = [Problem("".join(letters), start) for *letters, start in drawn]
    problems.sort(key=lambda _: rng.random())
    if train + test >= len(problems):
        raise ValueError(f"found {train} + {test} problems, wanted fewer than {len(problems)}")
    write_model(folder / "model")
    taught = [problems[train + test + i % (len(problems) - train - test)] for i in range(sft)]
    talks = [conversation_row(p, trace(p, task, machines, rng)) for p in taught]
    write_rows(folder / "sft.jsonl", talks)
    for name, part in (("train", problems[:train]), ("test", problems[train : train + test])):
        truths = [trace(problem, task, machines)[-2] for problem in part]
        made = [prompt_row(*row, name, i) for i, row in enumerate(zip(part, truths, strict=True))]
        write_rows(folder / f"{name}.jsonl", made)


def prompt_row(problem: Problem, truth: str, split: str, index: int) -> dict[str, object]:
    """A row of train.jsonl or test.jsonl."""
    return {
        "data_source": "machines",
        "prompt": [{"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index},
    }


def conversation_row(problem: Problem, worked: str) -> dict[str, object]:
    """A row of sft.jsonl."""
    return {
        "messages": [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": worked},
        ]
    }


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(directory: Path) -> None:
    """Write the model's shape and its tokenizer: one token for each character and for the box."""
    vocabulary = [PAD, EOS, *"0123456789=,;.}", *"".join(KINDS)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    filler = [f"<unused{i}>" for i in range(-tokenizer.get_vocab_size() % 32)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in filler])
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
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": 4 * HIDDEN,
        "hidden_act": "silu",
        "vocab_size": tokenizer.get_vocab_size(),
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "pad_token_id": vocabulary.index(PAD),
        "eos_token_id": vocabulary.index(EOS),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Write the miniature's own files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="problems for PRIME")
    parser.add_argument("--test", type=int, default=200, help="held-out problems")
    parser.add_argument("--sft", type=int, default=20000, help="traces for fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="chooses tables, problems and slips")
    options = parser.parse_args(arguments)
    write_task(options.out, Task(seed=options.seed), options.train, options.test, options.sft)


if __name__ == "__main__":
    main()
