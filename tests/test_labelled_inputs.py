"""The reference of offline training: it speaks once, and what it said is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.data.answered import Answered
from megatron_prime.data.labelled import LabelledGroup
from megatron_prime.data.rows import DataError
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import TokenSequence

before_megatron_import()

from megatron_prime import labelled_inputs  # noqa: E402

RANKS: Any = SimpleNamespace(rank=0, share=lambda value: value)


class Reference:
    """Gives token t the log-prob -t, and counts the sequences that it was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.batches: object = None
        self.engine = self
        self.grid = SimpleNamespace(dp_size=2, multiple=1)

    def logprobs(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        assert len(sequences) % 2 == 0, "data-parallel ranks share them evenly"
        self.asked += len(sequences)
        found = torch.zeros(len(sequences), max(s.response_length for s in sequences))
        for row, s in enumerate(sequences):
            found[row, : s.response_length] = -torch.tensor(s.token_ids[s.prompt_length :])
        return found


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    model = Reference()

    def loaded(config: RunConfig, batches: object) -> Reference:
        model.batches = batches
        return model

    monkeypatch.setattr(labelled_inputs, "loaded_reference", loaded)
    return model


def config(folder: Path, reference: str = "once") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": folder},
            "model": {"hf": "m"},
            "data": {"train": "t"},
            "train_prm": {"reference": reference},
        }
    )


def groups(count: int, prompt: int) -> list[LabelledGroup]:
    return [LabelledGroup((prompt, n), ((n,), (n, 7, n)), (1.0, 0.0)) for n in range(count)]


LEARNT, JUDGED = groups(300, prompt=1), groups(2, prompt=2)


def check(found: Any, learnt: list[LabelledGroup]) -> None:
    """Every log-prob is that of its token, of what is learnt and of what is held out."""
    model, held_out = found
    batch = labelled_inputs.as_batch(learnt)
    logprobs = model.logprobs(batch)
    for row, (group, n) in enumerate((g, n) for g in learnt for n in (0, 1)):
        ids = group.responses[n]
        assert logprobs[row].tolist() == [-float(t) for t in ids] + [0.0] * (3 - len(ids))
    assert held_out.ref_logprobs.tolist() == [
        [0.0, 0.0, 0.0],
        [0.0, -7.0, 0.0],
        [-1.0, 0.0, 0.0],
        [-1.0, -7.0, -1.0],
    ]


def test_the_reference_is_asked_once_for_all_starts(tmp_path: Path, reference: Reference) -> None:
    """604 sequences are three chunks, the last of which two ranks share as it is."""
    check(labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS), LEARNT)
    assert reference.asked == 604
    check(labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS), LEARNT)
    assert reference.asked == 604


def test_it_says_how_far_it_is(
    tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS)
    said = [f"reference: {done} of 604 responses" for done in (256, 512, 604)]
    assert capsys.readouterr().out.splitlines() == said
    other: Any = SimpleNamespace(rank=1, share=lambda value: value)
    labelled_inputs.reference_of(config(tmp_path), LEARNT[:1], JUDGED, other)
    assert capsys.readouterr().out == ""


def test_no_padding_stays_in_memory(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a batch of everything, padded to the longest, nor the chunks that rows are cut of."""
    whole, batches = labelled_inputs.as_batch, list[int]()

    def as_batch(groups: Sequence[LabelledGroup]) -> Any:
        batches.append(len(groups))
        return whole(groups)

    monkeypatch.setattr(labelled_inputs, "as_batch", as_batch)
    monkeypatch.setattr(labelled_inputs, "_scored", lambda *_: None)
    labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS)
    assert reference.asked == 604
    assert batches == []
    sequences = [*labelled_inputs.sequences_of(LEARNT)]
    for part in labelled_inputs._spoken(reference, sequences, 0, RANKS):
        assert part.untyped_storage().nbytes() == 4 * len(part)


def test_a_stopped_pass_goes_on_with_the_next_chunk(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third chunk, it has kept two."""
    speak, chunks = reference.logprobs, list[int]()

    def killed(sequences: Sequence[TokenSequence]) -> torch.Tensor:
        if len(chunks) == 2:
            raise KeyboardInterrupt
        chunks.append(len(sequences))
        return speak(sequences)

    monkeypatch.setattr(labelled_inputs, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(reference, "logprobs", killed)
    with pytest.raises(KeyboardInterrupt):
        labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS)
    monkeypatch.setattr(reference, "logprobs", speak)
    assert reference.asked == 512
    check(labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS), LEARNT)
    assert reference.asked == 604


def test_other_data_or_a_damaged_file_asks_anew(tmp_path: Path, reference: Reference) -> None:
    labelled_inputs.reference_of(config(tmp_path), LEARNT, JUDGED, RANKS)
    check(labelled_inputs.reference_of(config(tmp_path), LEARNT[:3], JUDGED, RANKS), LEARNT[:3])
    assert reference.asked == 604 + 10
    kept = tmp_path / "reference_logprobs.pt"
    kept.write_bytes(kept.read_bytes()[:100])
    check(labelled_inputs.reference_of(config(tmp_path), LEARNT[:3], JUDGED, RANKS), LEARNT[:3])
    assert reference.asked == 604 + 20


def test_another_model_of_the_same_path_is_asked_anew(tmp_path: Path, reference: Reference) -> None:
    given = config(tmp_path)
    model = given.model.model_copy(update={"hf": tmp_path / "model"})
    given = given.model_copy(update={"model": model})
    (tmp_path / "model").mkdir()

    def asked(of: RunConfig) -> int:
        before = reference.asked
        check(labelled_inputs.reference_of(of, LEARNT[:3], JUDGED, RANKS), LEARNT[:3])
        return reference.asked - before

    assert (asked(given), asked(given)) == (10, 0)
    (tmp_path / "model" / "model.safetensors").touch()
    assert (asked(given), asked(given)) == (10, 0)
    fp8 = given.precision.reference.model_copy(update={"fp8": "e4m3"})
    precision = given.precision.model_copy(update={"reference": fp8})
    assert asked(given.model_copy(update={"precision": precision})) == 10


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Answered]]:
    """What each file has, by its name."""
    found = dict[str, list[Answered]]()
    monkeypatch.setattr(labelled_inputs, "read_answered", lambda source, *_: found[str(source)])
    monkeypatch.setattr(
        labelled_inputs, "shape_of", lambda config, name: SimpleNamespace(vocab_size=9)
    )
    return found


def answered(prompt: int, count: int = 2) -> Answered:
    return Answered("line 1", None, (prompt,), ((3,),) * count, (0.0, 1.0)[:count])


def groups_of(folder: Path) -> tuple[list[int], list[int]]:
    """The prompts that are learnt, and those that judge."""
    given = config(folder)
    knobs = given.train_prm.model_copy(update={"data": Path("data"), "held_out": Path("judge")})
    rollout = given.rollout.model_copy(update={"group_size": 2})
    given = given.model_copy(update={"train_prm": knobs, "rollout": rollout})
    learnt, judged = labelled_inputs.groups_of(given, None, RANKS)  # type: ignore[arg-type]
    return [g.prompt_ids[0] for g in learnt], [g.prompt_ids[0] for g in judged]


def test_what_is_held_out_is_not_learnt(
    tmp_path: Path, answers: dict[str, list[Answered]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["data"] = [answered(n) for n in (1, 2, 3)]
    answers["judge"] = [answered(n) for n in (2, 4)]
    assert groups_of(tmp_path) == ([1, 3], [2, 4])
    assert "data: dropped: 1 groups of prompts that are held out" in capsys.readouterr().out
    answers["judge"] += [answered(n) for n in (1, 3)]
    with pytest.raises(DataError, match="found the prompts of all 3 groups of data in judge"):
        groups_of(tmp_path)
    answers["judge"] = [answered(5, count=1)]
    with pytest.raises(DataError, match=r"left to judge the PRM by in judge, train_prm\.held_out"):
        groups_of(tmp_path)


def test_a_loaded_reference_stays(tmp_path: Path, reference: Reference) -> None:
    """Only what is held out is asked for now, for its log-probs never change."""
    found, held_out = labelled_inputs.reference_of(
        config(tmp_path, "loaded"), LEARNT, JUDGED, RANKS
    )
    assert found is reference
    assert held_out is not None
    assert reference.asked == 4
    assert not (tmp_path / "reference_logprobs.pt").exists()


@pytest.mark.parametrize("kind", ["once", "loaded"])
def test_the_references_batches_are_cut_as_the_prms(
    tmp_path: Path, reference: Reference, kind: str
) -> None:
    """Also where no process reward would use a PRM in a run."""
    given = config(tmp_path, kind)
    given = given.model_copy(
        update={"advantage": given.advantage.model_copy(update={"process_weight": 0.0})}
    )
    labelled_inputs.reference_of(given, LEARNT[:1], JUDGED, RANKS)
    assert reference.batches is given.prm


def test_nothing_may_be_held_out(tmp_path: Path, reference: Reference) -> None:
    for kind in ("once", "loaded"):
        _, held_out = labelled_inputs.reference_of(config(tmp_path, kind), LEARNT[:1], [], RANKS)
        assert held_out is None
