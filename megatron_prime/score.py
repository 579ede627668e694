"""`python -m megatron_prime score`: what a PRM thinks of each token and step of given texts.

Each response of `score.input` becomes a line of `score.output`: its tokens with their rewards
r_t = beta * log(prm / ref), its steps with the sum of theirs, all rewards' sum R and sigma(R), the
PRM's estimate that the response is right. PRM and reference are loaded on the ranks as
`[megatron]` says. Lines are written a chunk at a time, so the same command continues after a kill.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from megatron_prime import build
from megatron_prime.benchmarks.tasks import identity, precision_options
from megatron_prime.config import RunConfig
from megatron_prime.data.answered import Answered, read_answered
from megatron_prime.data.chat import Tokenizer, load_tokenizer
from megatron_prime.data.rows import DataError
from megatron_prime.data.steps import SeparatedSteps
from megatron_prime.data.token_text import pieces
from megatron_prime.families import max_positions, with_defaults
from megatron_prime.models.scoring import PrmScorer, scoring_config
from megatron_prime.protocols import StepReader
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.line_files import RecordsError, append, changes, read_chunks
from megatron_prime.types import RolloutBatch, TokenSequence
from megatron_prime.weights.shape import shape_of


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens up to a separator, the separator included, or up to the end."""

    tokens: tuple[int, int]  # first, and behind the last
    characters: tuple[int, int]  # of the response's text
    reward: float  # sum over its tokens


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A line of scores: one response."""

    row: str  # "line 3" of the input
    id: str | None
    response: int  # of that row, from 0
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]  # the text of each; joined, `text`
    rewards: tuple[float, ...]  # r_t
    steps: tuple[Step, ...]
    total: float  # R, the sum of the rewards
    probability: float  # sigma(R)
    label: float | None


@dataclass(frozen=True, slots=True)
class Item:
    """A response to be scored."""

    row: Answered
    number: int

    @property
    def sequence(self) -> TokenSequence:
        """As the models see it."""
        prompt = self.row.prompt_ids
        return TokenSequence(prompt + self.row.responses[self.number], len(prompt))


_LINE = TypeAdapter(ScoredText)


def score(config: RunConfig, launch: Launch) -> None:
    """The command."""
    knobs = config.score
    assert knobs.input is not None, "validate.check wants it"
    assert knobs.prm is not None, "validate.check wants it"
    tokenizer = load_tokenizer(config.model.hf)
    folder = config.run.folder / "scores"
    output = config.score_output
    steps = SeparatedSteps(tokenizer, config.advantage.step_separator)
    given = config
    config = scoring_config(config, knobs.prm, knobs.reference)
    with build.training_session(config, launch, "score") as ranks:
        vocabulary = shape_of(config, "reference").vocab_size
        rows = read_answered(knobs.input, tokenizer, config.data.template, False, vocabulary)
        items = [Item(row, number) for row in rows for number in range(len(row.responses))]
        check_lengths(config, knobs.input, items)
        written = ranks.share(continued(config, output, items) if ranks.rank == 0 else None)
        assert written is not None, "rank 0 has said it"
        build.note_start(given, folder, ranks)
        if written < len(items):
            scorer = PrmScorer.load(config, knobs.prm)
            with launch.steps(agree=None):
                for start in range(written, len(items), knobs.chunk):
                    part = items[start : start + knobs.chunk]
                    rewards, mask = scorer.rewards([item.sequence for item in part])
                    if ranks.rank == 0:
                        lines = scored(part, rewards, mask, tokenizer, steps)
                        append(output, [_LINE.dump_json(line) for line in lines])
                        print(f"scored: {start + len(part)} of {len(items)}", flush=True)
        if ranks.rank == 0:
            print(f"scores: {output}")


def check_lengths(config: RunConfig, source: Path, items: Sequence[Item]) -> None:
    """DataError with all responses that PRM or reference have no room for."""
    folders = {config.model.hf, config.prm.hf or config.model.hf}
    shapes = (json.loads((folder / "config.json").read_text()) for folder in folders)
    positions = min(max_positions(with_defaults(shape)) for shape in shapes)
    room = min(config.prm.micro_batch_tokens * config.parallel.cp, positions)
    long = [
        f"  {item.row.place}: response {item.number} has {length} tokens with its prompt"
        for item in items
        if (length := len(item.sequence.token_ids)) > room
    ]
    if long:
        raise DataError(
            f"{source}: found {len(long)} responses that are too long, wanted at most {room} "
            f"tokens (prm.micro_batch_tokens, and the {positions} positions of the models):\n"
            + "\n".join(long[:20])
        )


def continued(config: RunConfig, output: Path, items: Sequence[Item]) -> int:
    """How many responses are in `output` already; notes what decides on them.

    Raises RecordsError if it was made of other texts or by another PRM.
    """
    prm = config.score.prm
    assert prm is not None, "validate.check wants it"
    options = {
        "prm": str(prm),
        "prm_weights": identity(prm),
        "reference": str(config.model.hf),
        "reference_weights": identity(config.model.hf),
        "beta": config.prm.beta,
        **precision_options(config),
        "step_separator": config.advantage.step_separator,
        "texts": fingerprint(items),
    }
    noted = output.with_suffix(".options.json")
    if changed := changes(output, options, noted):
        raise RecordsError(
            f"{output} was made with other options; set them back to continue it, remove it and "
            f"{noted.name}, or take another score.output:\n" + "\n".join(changed)
        )
    return len(read_chunks(output, _LINE, config.score.chunk, len(items)))


def fingerprint(items: Sequence[Item]) -> str:
    """16 hex digits that change with all that a line repeats of the input: tokens, place, id and
    label."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        sequence, row = item.sequence, item.row
        numbers = [sequence.prompt_length, len(sequence.token_ids), *sequence.token_ids]
        digest.update(array("q", numbers))
        label = None if row.labels is None else row.labels[item.number]
        digest.update(repr((row.place, row.id, item.number, label)).encode())
    return digest.hexdigest()


def scored(
    items: Sequence[Item], rewards: Tensor, mask: Tensor, tokenizer: Tokenizer, reader: StepReader
) -> Iterator[ScoredText]:
    """The lines of `items`, whose token rewards and response mask are [N, T]."""
    nothing = torch.zeros(mask.shape)
    sequences = tuple(item.sequence for item in items)
    ends = reader.step_ends(RolloutBatch(sequences, 1, mask, torch.zeros(len(mask)), nothing))
    assert ends is not None, "asked of a reader that knows a separator"
    for item, row, inside, of_row in zip(items, rewards, mask, ends, strict=True):
        labels, token_ids = item.row.labels, item.row.responses[item.number]
        texts, found, total = pieces(token_ids, tokenizer), row[inside], row[inside].sum()
        yield ScoredText(
            row=item.row.place,
            id=item.row.id,
            response=item.number,
            text="".join(texts),
            token_ids=token_ids,
            tokens=tuple(texts),
            rewards=tuple(found.tolist()),
            steps=tuple(steps_of(texts, found, of_row[inside])),
            total=float(total),
            probability=float(total.sigmoid()),
            label=None if labels is None else labels[item.number],
        )


def steps_of(texts: Sequence[str], rewards: Tensor, ends: Tensor) -> Iterator[Step]:
    """The steps of a response of T tokens, whose rewards and ends of steps are [T]."""
    behind = [0, *accumulate(map(len, texts))]  # characters before each token, and all
    start = 0
    for end in sorted({*(ends.nonzero().flatten() + 1).tolist(), len(texts)}):
        reward = float(rewards[start:end].sum())
        yield Step((start, end), (behind[start], behind[end]), reward)
        start = end
