"""What a run was: its resolved configuration, versions and commit, beside what it produced."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from megatron_prime.config import RunConfig
from megatron_prime.config_file import describe

PACKAGES = (
    "megatron_prime",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "sglang",
    "math-verify",
    "numpy",
)


def write_provenance(folder: Path, config: RunConfig, ranks: int) -> None:
    """Write `config.toml` and append this start of the run to `starts.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(describe(config) + "\n")
    start = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "ranks": ranks,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def installed(package: str) -> str | None:
    """The version of `package`, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the code that runs (`+` if it was changed since), None outside git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed package
        return None
