"""The archives in which `torch.save` puts a tensor, as bytes around the tensor's own.

A chunk of a distributed checkpoint is such an archive: a zip file, nothing compressed, with a
pickle that describes the tensor (`data.pkl`) and its bytes (`data/0`). `frame` gives what comes
before and after the bytes, so that these go from file to file without becoming a tensor, and
`data_of` finds them in an archive. The pickle is read by an unpickler that knows three names and
runs nothing else.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from megatron_prime.weights.dtypes import ITEMSIZE

_ALIGNMENT = 64  # bytes, of torch's own
_STORAGES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "Float"}
_DTYPES = {f"{storage}Storage": dtype for dtype, storage in _STORAGES.items()}
_ROOT = "archive"
_BIG = 0xFFFFFFFF  # what does not fit into 32 bits is told in a zip64 field


class Data(NamedTuple):
    """A tensor in an archive."""

    dtype: str
    size: tuple[int, ...]
    start: int  # of its bytes, from the archive's beginning


class Frame(NamedTuple):
    """An archive but for the tensor's bytes."""

    head: bytes
    tail: bytes


@lru_cache(maxsize=256)
def frame(dtype: str, size: tuple[int, ...]) -> Frame:
    """The archive of a contiguous tensor. Its checksum is left out, as torch.save can, too."""
    nbytes = prod(size) * ITEMSIZE[dtype]
    members: dict[str, bytes | int] = {"data.pkl": _pickle(dtype, size), "byteorder": b"little"}
    return _zip(members | {"data/0": nbytes, "version": b"3\n"})


def plain(value: Any) -> bytes:
    """The archive of a value of Python's own."""
    members = {"data.pkl": pickle.dumps(value, 2), "byteorder": b"little", "version": b"3\n"}
    return _zip(members).head


def _zip(members: Mapping[str, bytes | int]) -> Frame:
    """What stands around a member of which only the length is given; or all of it, as the head."""
    parts, at, directory = [b""], 0, b""
    for name, content in members.items():
        length = content if isinstance(content, int) else len(content)
        sums = 0 if isinstance(content, int) else zlib.crc32(content)
        full = f"{_ROOT}/{name}".encode()
        wide = struct.pack("<HHQQ", 1, 16, length, length) if length >= _BIG else b""
        filled = -(at + 30 + len(full) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<HH", 0x4246, filled) + b"Z" * filled
        known = struct.pack("<HHHHI", 0, 0, 0, 0, sums)  # flags, stored, no time, no date
        known += struct.pack("<II", min(length, _BIG), min(length, _BIG))
        local = b"PK\3\4" + struct.pack("<H", 45 if wide else 20) + known
        local += struct.pack("<HH", len(full), len(extra)) + full + extra
        far = struct.pack("<QQ", length, length) if length >= _BIG else b""
        far += struct.pack("<Q", at) if at >= _BIG else b""
        far = struct.pack("<HH", 1, len(far)) + far if far else b""
        directory += b"PK\1\2" + struct.pack("<HH", 45, 45 if far else 20) + known
        directory += struct.pack("<HHHHHII", len(full), len(far), 0, 0, 0, 0, min(at, _BIG))
        directory += full + far
        at += len(local) + length
        parts[-1] += local
        if isinstance(content, int):
            parts.append(b"")
        else:
            parts[-1] += content
    count, size = len(members), len(directory)
    ends = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, at)
    ends += b"PK\6\7" + struct.pack("<IQI", 0, at + size, 1)
    ends += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, min(at, _BIG), 0)
    parts[-1] += directory + ends
    return Frame(parts[0], parts[1] if len(parts) > 1 else b"")


def _pickle(dtype: str, size: Sequence[int]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage 0, offset 0, size, stride, no gradient, no hooks)."""

    def ints(numbers: Sequence[int]) -> bytes:
        return b"(" + b"".join(pickle.dumps(n, 2)[2:-1] for n in numbers) + b"t"

    def text(word: str) -> bytes:
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    strides = [prod(size[i + 1 :]) for i in range(len(size))]
    storage = f"ctorch\n{_STORAGES[dtype]}Storage\n".encode()
    numel = ints([prod(size)])[1:-1]
    stored = b"(" + text("storage") + storage + text("0") + text("cpu") + numel + b"tQ"
    tensor = b"(" + stored + b"K\0" + ints(size) + ints(strides)
    no_hooks = b"ccollections\nOrderedDict\n)R"
    return b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n" + tensor + b"\x89" + no_hooks + b"tR."


def data_of(file: Any, start: int, length: int) -> Data:
    """The tensor of the archive in a stretch of `file`. ValueError when it is none that we read."""
    archive: Any = _Window(file, start, length)
    try:
        with zipfile.ZipFile(archive) as members:
            by_name = {m.filename.partition("/")[2]: m for m in members.infolist()}
            at = _content(archive, by_name["data.pkl"])
            archive.seek(at)
            described = archive.read(by_name["data.pkl"].file_size)
            dtype, offset, size, stride = _Described(io.BytesIO(described)).load()
            held = by_name["data/0"]
        if stride != tuple(prod(size[i + 1 :]) for i in range(len(size))):
            raise ValueError(f"strides {stride} of {size}: not in row-major order")
        first = offset * ITEMSIZE[dtype]
        if held.compress_type or first + prod(size) * ITEMSIZE[dtype] > held.file_size:
            raise ValueError(f"{held.file_size:,} bytes for {size} in {dtype}")
        return Data(dtype, size, _content(archive, held) + first)
    except (  # each of them is what some changed byte leads to
        zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError,
        AttributeError, RuntimeError, struct.error, MemoryError, OverflowError,
    ) as error:  # fmt: skip
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _content(archive: Any, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin; only its own header tells."""
    archive.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.read(4))
    return int(member.header_offset + 30 + name + extra)


class _Described(pickle.Unpickler):
    """Type, offset, size and stride of a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda dtype, offset, size, stride, *_: (dtype, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}: wanted a tensor of {list(_STORAGES)}")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        left = max(self._length - self._at, 0)
        got: int = self._file.readinto(memoryview(buffer)[:left])
        self._at += got
        return got
