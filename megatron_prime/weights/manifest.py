"""What belongs to a checkpoint: every file with its size and checksum, in `manifest.json`.

A file that a full disk, a lost machine or a hand has cut, dropped or changed is found before any of
it is loaded, and named. The checksum is zlib's CRC-32: it is made against accidents, not against
people, takes no package, and runs without Python's lock, at about 2 GB/s on one core of the machine
where it was tried. Each rank does its share, when a checkpoint is written (the files that it wrote
itself, which are still in its machine's memory) and when one is read (an equal share of the bytes,
whoever wrote them): a resume reads the checkpoint once more than it would without.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

NAME = "manifest.json"
_CHUNK = 1 << 24  # bytes


class Entry(NamedTuple):
    """What a file must be."""

    size: int  # bytes
    crc32: int


class Damage(NamedTuple):
    """A file that is not what the manifest says."""

    file: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: {self.found}"


def measure(path: Path, to_disk: bool = False) -> Entry:
    """Size and checksum of a file; `to_disk` waits until it would survive a loss of power."""
    crc32 = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc32, size = zlib.crc32(chunk, crc32), size + len(chunk)
        if to_disk:
            os.fsync(file.fileno())
    return Entry(size, crc32)


def files_in(folder: Path) -> list[str]:
    """All files of a checkpoint but the manifest, by their path within it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != NAME)


def write(folder: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest, whole and on disk before this returns."""
    files = {name: list(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"files": files, "crc32": zlib.crc32(json.dumps(files).encode())}, indent=1)
    with (folder / NAME).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Entry] | Damage:
    """The manifest of a checkpoint, or what is wrong with it."""
    try:
        found = json.loads((folder / NAME).read_bytes())
        if zlib.crc32(json.dumps(found["files"]).encode()) != found["crc32"]:
            return Damage(NAME, "its checksum is wrong")
        return {name: Entry(*entry) for name, entry in found["files"].items()}
    except FileNotFoundError:
        return Damage(NAME, "it is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:  # cut, changed, unreadable
        return Damage(NAME, f"it can't be read ({type(error).__name__}: {error})")


def check(folder: Path, name: str, wanted: Entry) -> Damage | None:
    """What is wrong with a file: its size, and only then, reading all of it, its content."""
    try:
        size = (folder / name).stat().st_size
        if size != wanted.size:
            return Damage(name, f"it has {size:,} bytes of {wanted.size:,}")
        if measure(folder / name) != wanted:
            return Damage(name, "its bytes are not those that were written")
    except FileNotFoundError:
        return Damage(name, "it is missing")
    except OSError as error:  # rights, or a disk that can't read it
        return Damage(name, f"it can't be read ({error})")
    return None


def share(entries: dict[str, Entry], rank: int, world_size: int) -> Iterable[str]:
    """This rank's files to read: each goes to whoever has least to do, the largest first."""
    loads = [0] * world_size
    for name, entry in sorted(entries.items(), key=lambda item: (-item[1].size, item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += entry.size
        if lightest == rank:
            yield name
