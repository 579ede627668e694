"""The table of a distributed checkpoint, `.metadata`, read and written without torch.

It is a pickle of torch's own classes: for each key type, size and chunks, and for each chunk the
file and the stretch of it. What a pickle names would be run as it is read, so the reader knows the
few names of such a table; whatever else it finds of torch's or Megatron's becomes an object without
behaviour, and of anybody else's an error. The writer names torch's classes and makes none of them.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prime.errors import WeightsError
from megatron_prime.weights.dtypes import ITEMSIZE

NAME = ".metadata"
_TABLE = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"


class Piece(NamedTuple):
    """A chunk of a parameter, or without offsets a state, and the bytes that hold it."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...]
    start: int
    length: int


@dataclass(slots=True)
class StoredTensor:
    """What is under a key: all layers of a parameter, for instance."""

    dtype: str
    size: tuple[int, ...]
    pieces: list[tuple[str, Piece]] = field(default_factory=list)  # with their files


@dataclass(frozen=True, slots=True)
class Table:
    """What a checkpoint holds."""

    tensors: dict[str, StoredTensor]
    ends: dict[str, int]  # by file: where the last of it ends


def read(folder: Path) -> Table:
    """The table of `folder`. WeightsError when there is none, or a damaged one."""
    try:
        with (folder / NAME).open("rb") as file:
            found = _Reader(file).load()
        places: dict[tuple[str, tuple[int, ...] | None], Any] = {
            (index.fqn, getattr(index, "offset", None)): place  # a state's has none
            for index, place in found.storage_data.items()
        }
        ends: dict[str, int] = {}
        for place in places.values():
            end = place.offset + place.length
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), end)
        tensors = {}
        for key, stored in found.state_dict_metadata.items():
            if hasattr(stored, "chunks"):
                dtype, size = stored.properties.dtype, tuple(stored.size)
                tensors[key] = StoredTensor(dtype, size, list(_pieces(key, stored, places)))
                assert dtype in ITEMSIZE, dtype
    except FileNotFoundError as error:
        raise WeightsError(f"{folder} is no distributed checkpoint: no {NAME}") from error
    except (  # each of them is what some changed byte leads to
        ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, MemoryError,
        OverflowError, RecursionError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise WeightsError(
            f"{folder / NAME} is damaged ({type(error).__name__}: {error}); "
            "bring it back from a copy"
        ) from error
    return Table(tensors, ends)


def _pieces(key: str, stored: Any, places: Mapping[Any, Any]) -> Iterable[tuple[str, Piece]]:
    for chunk in stored.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        place = places[key, offsets]
        assert len(offsets) == len(sizes) == len(stored.size), key
        assert all(at >= 0 and at + n <= m for at, n, m in zip(offsets, sizes, stored.size)), key  # noqa: B905
        yield str(place.relative_path), Piece(key, offsets, sizes, place.offset, place.length)


class _Without:
    """An object of some class of torch's or Megatron's: its state, and no behaviour."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Properties(_Without):
    """A tensor's: the type is all that matters."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ITEMSIZE:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == (_TABLE, "TensorProperties"):
            return _Properties
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "builtins" and name in ("set", "frozenset", "list", "dict", "tuple"):
            return {"set": set, "frozenset": frozenset, "list": list, "dict": dict}.get(name, tuple)
        if module.split(".")[0] in ("torch", "megatron"):
            return _Without
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Global(NamedTuple):
    module: str
    name: str


class _Object(NamedTuple):
    """Of a class, with a state; or the result of a call."""

    of: _Global
    state: Any
    called: bool = False


def write(
    folder: Path,
    pieces: Iterable[tuple[str, Piece]],  # with their files
    sizes: Mapping[str, tuple[tuple[int, ...], str]],  # and types, of the keys
) -> None:
    """Make the table of `folder`."""
    chunks: dict[str, list[Any]] = {key: [] for key in sizes}
    described: dict[str, Any] = {
        key: _object(
            "TensorStorageMetadata",
            properties=_properties(dtype),
            size=_size(size),
            chunks=chunks[key],
        )
        for key, (size, dtype) in sizes.items()
    }
    places = []
    for file, piece in pieces:
        offset = None if piece.offsets is None else _size(piece.offsets)
        if offset is None:
            described[piece.key] = _object("BytesStorageMetadata")
        else:
            sized = _size(piece.sizes)
            chunks[piece.key].append(_object("ChunkStorageMetadata", offsets=offset, sizes=sized))
        state = {"relative_path": file, "offset": piece.start, "length": piece.length}
        place = _Object(_Global(_FILES, "_StorageInfo"), state)
        places.append((_object("MetadataIndex", fqn=piece.key, offset=offset, index=None), place))
    metadata = _object(
        "Metadata",
        state_dict_metadata=described,
        planner_data=None,
        storage_data=_Pairs(places),
        storage_meta=None,
        version=None,
    )
    (folder / NAME).write_bytes(b"\x80\2" + _pickled(metadata) + b".")


class _Pairs(list[Any]):
    """The items of a dictionary."""


def _object(name: str, **state: Any) -> _Object:
    return _Object(_Global(_TABLE, name), state)


def _size(size: tuple[int, ...]) -> _Object:
    return _Object(_Global("torch", "Size"), (tuple(size),), called=True)


def _properties(dtype: str) -> _Object:
    """Type, layout, gradient, memory format (contiguous), pinned."""
    layout = _Object(_Global("torch.serialization", "_get_layout"), ("torch.strided",), True)
    contiguous = _Object(_Global(_TABLE, "_MEM_FORMAT_ENCODING"), (0,), True)
    state = (_Global("torch", dtype), layout, False, contiguous, False)
    return _Object(_Global(_TABLE, "TensorProperties"), state)


def _pickled(value: Any) -> bytes:
    """The opcodes (protocol 2) that make a value."""
    if isinstance(value, _Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, _Object):
        of, state = _pickled(value.of), _pickled(value.state)
        if value.called:
            return of + state + b"R"
        return of + b")\x81" + (state + b"b" if value.state else b"")
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_pickled, value)) + b"t"
    if isinstance(value, _Pairs | dict):
        pairs = value.items() if isinstance(value, dict) else value
        return b"}(" + b"".join(_pickled(k) + _pickled(v) for k, v in pairs) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, str):
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded
    assert value is None or isinstance(value, bool | int), value
    return pickle.dumps(value, 2)[2:-1]
