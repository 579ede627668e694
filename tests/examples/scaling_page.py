"""The blocks of docs/scaling.md that commands make, and the public model that they are for.

`PYTHONPATH=. python tests/examples/scaling_page.py` writes them into the page anew.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import tempfile
from pathlib import Path
from typing import Any

from slurm_plans import EXAMPLES, ROOT, model_of, plan, ranks_of

scaling = importlib.import_module("scaling")  # of tools/, which slurm_plans put on the path

PAGE = ROOT / "docs/scaling.md"
NAMES = ("llama3.1-70b_64gpu", "llama3.1-70b_128gpu")
COMMANDS: dict[str, tuple[Any, str]] = {  # block: program and its first word
    "step": (plan, "step"),
    "reshard": (plan, "reshard"),
    "limits": (scaling, "limits"),
    "pipeline": (scaling, "pipeline"),
    "generation": (scaling, "generation"),
    "exchanges": (scaling, "exchanges"),
}
# The weight sync at the share of the links' bandwidth that all other blocks assume.
OPTIONS = {"reshard": ["--gb-per-s", "360", "--network-gb-per-s", "40"]}
_BLOCK = re.compile(r"<!-- (\w+) (\d+) -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks() -> dict[tuple[str, str], str]:
    """What stands in the page, by command and ranks."""
    return {(found[1], found[2]): found[3] for found in _BLOCK.finditer(PAGE.read_text())}


def wanted(block: str, ranks: str) -> str:
    """What should stand there: the command, and what it prints today."""
    name = next(one for one in NAMES if str(ranks_of(one)) == ranks)
    program, word = COMMANDS[block]
    toml = f"examples/{name}/prime.toml"
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
        hf = model_of(name, Path(folder))
        given = [f"--model.hf={hf}", f"--data.train={hf / 'config.json'}"]
        options = ["--ranks", ranks, *OPTIONS.get(block, [])]
        program.main([word, str(EXAMPLES / name / "prime.toml"), *options, *given])
    shown = f"python tools/{program.__name__}.py {word} {toml} {' '.join(options)}"
    return f"```\n$ {shown} --model.hf=DIR --data.train=FILE\n{output.getvalue()}```\n"


def _write() -> None:
    def made(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} {found[2]} -->\n{wanted(found[1], found[2])}<!-- end -->"

    PAGE.write_text(_BLOCK.sub(made, PAGE.read_text()))


if __name__ == "__main__":
    _write()
