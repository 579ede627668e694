"""Training files from published data sets: filtered, unique, decontaminated, with a report.

    python tools/prepare_data.py rl  --out DIR --tokenizer MODEL [--eval FILE]… FILE…
    python tools/prepare_data.py sft --out DIR --tokenizer MODEL [--eval FILE]… FILE…

The same command after a kill begins anew. See docs/data.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from megatron_prime.data.chat import Template, load_tokenizer
from megatron_prime.data.rows import DataError
from megatron_prime.errors import RunError
from megatron_prime.prepare.golds import PoolGrader
from megatron_prime.prepare.output import SUFFIXES
from megatron_prime.prepare.overlap import Evaluation
from megatron_prime.prepare.pipeline import Task, prepare
from megatron_prime.prepare.sources import RL_FORMATS, SFT_FORMATS
from megatron_prime.prepare.training_rows import (
    conversation_rows,
    conversation_screen,
    prompt_rows,
    prompt_screen,
)

NOT_IN_REPORT = ("out", "workers", "quiet")  # what changes no byte of the result


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason."""
    known = _parser().parse_args(arguments)
    try:
        with PoolGrader(known.workers, known.check_timeout) as grade:
            report = prepare(_task(known, grade), _options(known), _Counter(known.quiet))
        print("\n".join(report.table()))
        print(f"wrote {known.out}")
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _task(known: argparse.Namespace, grade: PoolGrader) -> Task:
    names = [path.name for path in (*known.inputs, *known.eval)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"found several files named {twice}, wanted names that tell them apart")
    tokenizer = load_tokenizer(known.tokenizer)
    if known.kind == "rl":
        screen = prompt_screen(grade, known.drop_yes_no)
        finish = prompt_rows(tokenizer, known.template, known.max_tokens)
    else:
        screen = conversation_screen(grade)
        finish = conversation_rows(tokenizer, known.template, known.max_tokens)
    return Task(
        inputs=tuple(known.inputs),
        out=known.out,
        formats=RL_FORMATS if known.kind == "rl" else SFT_FORMATS,
        screen=screen,
        finish=finish,
        evaluation=Evaluation(known.eval, known.overlap, known.overlap_share),
        format=known.format,
        suffix=known.suffix,
        near_duplicates=known.near_duplicates,
        drop_malformed=known.malformed == "drop",
        validation=known.validation,
        seed=known.seed,
    )


def _options(known: argparse.Namespace) -> dict[str, Any]:
    """The command's options, for the report; of paths only the names."""
    options = {name: value for name, value in vars(known).items() if name not in NOT_IN_REPORT}
    for name in ("inputs", "eval"):
        options[name] = [path.name for path in options[name]]
    return {**options, "tokenizer": known.tokenizer.name}


class _Counter:
    """A line on stderr now and then."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._next = quiet, 10_000

    def __call__(self, rows: int) -> None:
        if not self._quiet and rows >= self._next:
            print(f"{rows} rows read", file=sys.stderr, flush=True)
            self._next += 10_000


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"found {text}, wanted a share from 0 to below 1")
    return share


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    rl = kinds.add_parser("rl", help="prompts with ground truths, for `megatron_prime train`")
    rl.add_argument("--drop-yes-no", action="store_true", help="drop answers that are half guessed")
    sft = kinds.add_parser("sft", help="conversations, for `megatron_prime sft`")
    for kind, formats, tokens in ((rl, RL_FORMATS, 1024), (sft, SFT_FORMATS, 4096)):
        limit = "data.max_prompt_length" if kind is rl else "sft.max_length"
        _common(kind.add_argument, list(formats), tokens, limit)
    return parser


def _common(add: Any, formats: list[str], tokens: int, limit: str) -> None:
    add("inputs", nargs="+", type=Path, metavar="FILE", help=".jsonl or .parquet")
    add("--out", type=Path, required=True, help="folder to make")
    add("--tokenizer", type=Path, required=True, help="Hugging Face directory of the model")
    add("--format", choices=formats, help="of all inputs (default: by their fields)")
    add("--suffix", choices=SUFFIXES, default=".jsonl", help="of the files to write")
    add("--template", choices=get_args(Template), default="plain", help="as data.template")
    add("--max-tokens", type=int, default=tokens, help=f"as {limit} (default: {tokens})")
    add("--eval", type=Path, action="append", default=[], help="evaluation file to keep out")
    add("--overlap", type=int, default=13, help="words in a row that contaminate (default: 13)")
    add("--overlap-share", type=_share, default=0.25, help="of the runs of an evaluation problem")
    add("--near-duplicates", action=argparse.BooleanOptionalAction, default=True)
    add("--malformed", choices=("error", "drop"), default="error", help="default: error, of all")
    add("--validation", type=_share, default=0.0, help="share that goes to a validation file")
    add("--seed", type=int, default=0, help="chooses which")
    add("--workers", type=int, default=2, help="processes that compare answers (default: 2)")
    add("--check-timeout", type=float, default=5.0, help="seconds for a comparison (default: 5)")
    add("--quiet", action="store_true", help="no progress")


if __name__ == "__main__":
    sys.exit(main())
