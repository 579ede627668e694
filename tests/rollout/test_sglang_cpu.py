"""What a server on a CPU gets besides SGLang: seeded sampling, and stand-ins that refuse."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from megatron_prime.rollout.sglang_arguments import CPU_FOLDER
from megatron_prime.rollout.sglang_cpu.sglang_cpu_plugin import hashed, multinomial_with_seed

PROBABILITIES = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
COUNT = 40_000


def frequencies(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    logprobs = PROBABILITIES.log().expand(len(seeds), -1)
    tokens = multinomial_with_seed(logprobs, seeds, positions)[:, 0]
    return torch.bincount(tokens, minlength=5) / len(seeds)


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (torch.full((COUNT,), 7), torch.arange(COUNT)),
        (torch.arange(COUNT), torch.zeros(COUNT, dtype=torch.int64)),
        (torch.arange(COUNT) << 32, torch.full((COUNT,), 5)),
    ],
)
def test_tokens_come_as_often_as_they_are_likely(seeds, positions) -> None:
    found = frequencies(seeds, positions)
    spread = (PROBABILITIES * (1 - PROBABILITIES) / COUNT).sqrt()
    assert ((found - PROBABILITIES).abs() <= 4 * spread).all()


def test_tokens_that_follow_each_other_are_independent() -> None:
    logprobs = torch.tensor([0.5, 0.5]).log().expand(COUNT, -1)
    for seeds, positions in (
        (torch.full((COUNT,), 3), torch.arange(COUNT)),
        (torch.arange(COUNT), torch.full((COUNT,), 3)),
    ):
        tokens = multinomial_with_seed(logprobs, seeds, positions)[:, 0]
        equal = (tokens[1:] == tokens[:-1]).double().mean().item()
        assert abs(equal - 0.5) < 4 * 0.5 / math.sqrt(COUNT)


def test_a_row_does_not_depend_on_the_others() -> None:
    logprobs = torch.randn(6, 1000).log_softmax(-1)
    seeds, positions = torch.tensor([5, -1, 1 << 62, 0, 5, 9]), torch.tensor([1, 2, 3, 4, 5, 6])
    together = multinomial_with_seed(logprobs, seeds, positions)
    for row in range(6):
        alone = multinomial_with_seed(logprobs[row : row + 1], seeds[[row]], positions[[row]])
        assert alone[0] == together[row]


def test_noise_of_two_streams_has_nothing_in_common() -> None:
    numbers = hashed(torch.tensor([1, 2, 1, 1 << 32]), torch.tensor([0, 0, 1, 0]), 5000)
    assert numbers.min() >= 0
    assert numbers.max() < 1 << 32
    assert len(numbers.unique()) > 19_990  # 20 000 draws out of 2^32 collide 0.05 times


def test_the_stand_ins_import_and_refuse() -> None:
    code = """
import sgl_kernel, sgl_kernel.allreduce as ops, torchvision
from torchvision.transforms import InterpolationMode, Normalize
from torchvision.transforms.v2 import functional
from torchvision.io import ImageReadMode, decode_image
assert InterpolationMode.BICUBIC.value == "bicubic"
for call, name in ((ops.all_reduce, "sgl_kernel.allreduce.all_reduce"), (Normalize, "Normalize")):
    try:
        call(1)
    except NotImplementedError as refused:
        assert name in str(refused), refused
    else:
        raise AssertionError(name)
try:
    import sgl_kernel.scalar_type
except ModuleNotFoundError:
    print("fine")
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(CPU_FOLDER)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "fine\n", ended.stderr


def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    code = """
from importlib.metadata import entry_points
(entry,) = entry_points(group="sglang.srt.plugins")
print(entry.load().__name__)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(CPU_FOLDER)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "install\n", ended.stderr
