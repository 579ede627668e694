"""A PRM's token rewards, as they are written down."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.errors import NotFinite
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.models.scoring import scoring_config, token_rewards  # noqa: E402

PAD = 1e9
MASK = torch.tensor([[True, True], [True, False]])


def test_token_rewards_are_differences_in_double_precision():
    prm = torch.tensor([[-1.0, -0.1], [-3.0, PAD]])
    ref = torch.tensor([[-1.5, -0.3], [-1.0, -PAD]])
    found = token_rewards(prm, ref, MASK, beta=0.5)
    wanted = [[0.25, 0.5 * (0.3 - 0.1)], [-1.0, 0.0]]
    assert found.dtype == torch.float64
    assert found.tolist() == [pytest.approx(row, abs=1e-8) for row in wanted]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_is_refused_but_on_padding(broken):
    prm, ref = torch.tensor([[-1.0, -2.0], [-3.0, broken]]), torch.full((2, 2), -1.0)
    assert token_rewards(prm, ref, MASK, beta=0.5)[1].sum() == -1.0
    prm[1, 0] = broken
    for pair in ((prm, ref), (ref, prm)):
        with pytest.raises(NotFinite, match="in 1 of 2 responses, the first in number 1;"):
            token_rewards(*pair, MASK, beta=0.5)


def test_the_reference_is_that_of_the_run_which_made_the_prm(tmp_path):
    config = RunConfig.model_validate(
        {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    )
    made_with = {"config": {"model": {"hf": "sft"}, "prm": {"hf": None}}}
    (tmp_path / "run.json").write_text(json.dumps(made_with))
    found = scoring_config(config, tmp_path, None)
    assert (str(found.model.hf), str(found.prm.hf)) == ("sft", "sft")
    made_with["config"]["prm"]["hf"] = "older"
    (tmp_path / "run.json").write_text(json.dumps(made_with))
    found = scoring_config(config, tmp_path, tmp_path / "other")
    assert (found.model.hf, str(found.prm.hf)) == (tmp_path / "other", "older")
    (tmp_path / "run.json").unlink()
    assert scoring_config(config, tmp_path, tmp_path / "other").prm.hf == tmp_path
