"""Rewrites a wheel without some of its members: a kernel package for one kind of GPU.

    python tests/gpu/trim_wheel.py WHEEL --out DIR [--drop GLOB …]

Without --drop it takes out of sglang-kernel what SGLang asks for by name only, or on other chips:
FlashAttention 3 (attention_backend = "triton" takes its place), FlashMLA, InfLLM, and the kernels
of all chips but Hopper. Its `__init__` loads sm90/common_ops on a Hopper GPU and nothing else.

RECORD is what it was, less the lines of what is gone; every member that stays is checked against
it. The name of the file stays, too, for pip reads versions and tags from it.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import sys
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

NOT_FOR_HOPPER = (
    "sgl_kernel/flash_ops.*",
    "sgl_kernel/flashmla_ops.*",
    "sgl_kernel/infllm_ops.*",
    "sgl_kernel/sm100/*",
)


class BadWheel(ValueError):
    """A member that RECORD does not know, or that is not what RECORD says."""


def main(arguments: list[str] | None = None) -> int:
    """Write the smaller wheel; say what has gone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the new one")
    parser.add_argument("--drop", nargs="+", default=NOT_FOR_HOPPER, help="members, as globs")
    known = parser.parse_args(arguments)
    known.out.mkdir(parents=True, exist_ok=True)
    target = known.out / known.wheel.name
    if target.resolve() == known.wheel.resolve():
        parser.error("--out is where the wheel is; wanted another folder")
    gone = trim(known.wheel, target, known.drop)
    for name in gone:
        print(f"dropped {name}")
    before, after = (path.stat().st_size / 2**20 for path in (known.wheel, target))
    print(f"{target}: {after:.1f} MiB of {before:.1f}")
    return 0


def trim(wheel: Path, target: Path, drop: Sequence[str]) -> list[str]:
    """Copy `wheel` to `target` without the members that match `drop`; their names.

    Raises BadWheel when the wheel has no RECORD, or one that does not fit its members.
    """
    draft = target.with_suffix(".new")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(draft, "w") as copy:
        names = [name for name in source.namelist() if not name.endswith("/")]
        records = [name for name in names if name.endswith(".dist-info/RECORD")]
        if len(records) != 1:
            raise BadWheel(f"{wheel}: found {len(records)} RECORD files, wanted one")
        rows = {row[0]: row for row in csv.reader(io.StringIO(source.read(records[0]).decode()))}
        gone = [name for name in names if any(fnmatch(name, glob) for glob in drop)]
        for name in names:
            if name in gone or name == records[0]:
                continue
            content = source.read(name)
            check(wheel, name, content, rows)
            copy.writestr(source.getinfo(name), content, zipfile.ZIP_DEFLATED)
        kept = io.StringIO()
        writer = csv.writer(kept, lineterminator="\n")
        writer.writerows(row for name, row in rows.items() if name not in gone)
        copy.writestr(source.getinfo(records[0]), kept.getvalue(), zipfile.ZIP_DEFLATED)
    draft.replace(target)
    return gone


def check(wheel: Path, name: str, content: bytes, rows: dict[str, list[str]]) -> None:
    """Raise BadWheel unless RECORD has this very content."""
    if name not in rows:
        raise BadWheel(f"{wheel}: RECORD lacks {name}; it may be damaged, download it again")
    found, wanted = digest(content), rows[name][1]
    if wanted != found:
        raise BadWheel(f"{wheel}: {name} has {found}, RECORD says {wanted}; download it again")


def digest(content: bytes) -> str:
    """As RECORD writes it."""
    found = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return f"sha256={found.decode().rstrip('=')}"


if __name__ == "__main__":
    sys.exit(main())
