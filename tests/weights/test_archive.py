"""Archives against torch's own, at sizes of more than 32 bits too, and what damages them."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch

from megatron_prime.weights.archive import Data, data_of, frame, plain

SIZES = [(5,), (3, 1024), (1, 2, 3), (1, 300, 70)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_torch_and_we_read_each_others(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, name = torch.randn(size).to(dtype), str(dtype).removeprefix("torch.")
    around = frame(name, size)
    ours = around.head + raw(tensor) + around.tail
    assert torch.equal(torch.load(io.BytesIO(ours), weights_only=True), tensor)
    file = io.BytesIO(b"before" + ours + b"after")
    assert data_of(file, 6, len(ours)) == Data(name, size, len(around.head))
    theirs = io.BytesIO()
    torch.save(tensor, theirs)
    found = data_of(theirs, 0, len(theirs.getvalue()))
    assert (found.dtype, found.size) == (name, size)
    assert theirs.getvalue()[found.start :].startswith(raw(tensor))


def test_a_tensor_of_five_gigabytes(tmp_path: Path) -> None:
    size = 152064, 8192
    around, path = frame("float32", size), tmp_path / "big"
    with path.open("wb") as file:  # sparse
        file.write(around.head)
        file.seek(4 * size[0] * size[1] - 8, 1)
        file.write(b"12345678" + around.tail)
    tensor = torch.load(path, mmap=True, weights_only=True)
    assert tuple(tensor.shape) == size
    assert raw(tensor[-1, -2:]) == b"12345678"
    with path.open("rb") as file:
        assert data_of(file, 0, path.stat().st_size).start == len(around.head)


def test_values_of_pythons_own() -> None:
    assert torch.load(io.BytesIO(plain([None])), weights_only=True) == [None]
    assert torch.load(io.BytesIO(plain({})), weights_only=True) == {}


def test_what_is_not_in_row_major_order_is_refused() -> None:
    file = io.BytesIO()
    torch.save(torch.randn(4, 3).t(), file)
    with pytest.raises(ValueError, match="not in row-major order"):
        data_of(file, 0, len(file.getvalue()))


def test_whatever_byte_changes_only_a_value_error_follows() -> None:
    tensor, chance, refused = torch.randn(4, 3), random.Random(0), 0
    whole = io.BytesIO()
    torch.save(tensor, whole)
    for _ in range(600):
        spoiled = bytearray(whole.getvalue())
        spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        try:
            data_of(io.BytesIO(spoiled), 0, len(spoiled))
        except ValueError:
            refused += 1
    assert refused > 30
