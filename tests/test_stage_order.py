"""What a stage looks at before it begins what takes long."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prime.config import RunConfig
from megatron_prime.data.labelled import LabelledGroup
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime import stages  # noqa: E402
from megatron_prime.weights.checkpoint import CheckpointError, RunCheckpoints  # noqa: E402


def test_a_folder_of_another_run_is_refused_before_the_reference_speaks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else its log-probs would stand where those of the run in that folder were."""

    def refuse(self: RunCheckpoints) -> None:
        assert self.command == "train_prm"
        assert self.folder == tmp_path / "checkpoints"
        raise CheckpointError("another run's")

    def speak(*_: Any) -> None:
        pytest.fail("the reference spoke")

    groups = [LabelledGroup((1,), ((2,), (3,)), (1.0, 0.0))]
    monkeypatch.setattr(stages.build, "training_session", lambda *_: nullcontext(SimpleNamespace()))
    monkeypatch.setattr(stages, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(stages.labelled_inputs, "groups_of", lambda *_: (groups, []))
    monkeypatch.setattr(stages.labelled_inputs, "reference_of", speak)
    monkeypatch.setattr(RunCheckpoints, "refuse_others", refuse)
    config = RunConfig.model_validate(
        {
            "run": {"folder": tmp_path},
            "model": {"hf": "unused"},
            "data": {"train": "unused"},
            "rollout": {"group_size": 2},
            "prm": {"mini_batch_size": 2},
        }
    )
    launch: Any = None
    with pytest.raises(CheckpointError, match="another run's"):
        stages.train_prm(config, launch)
