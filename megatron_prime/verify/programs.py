"""A program to be judged and what became of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

End = Literal["exit", "killed", "timeout", "output", "threads"]


@dataclass(frozen=True, slots=True)
class Program:
    """A script that reads stdin, or a function of it to be called."""

    source: str
    name: str | None = None  # of the function, or of the method of a class Solution
    arguments: str = "[]"  # of the call: a JSON list

    def to_bytes(self) -> bytes:
        """As the zygote's child reads it."""
        parts = {"source": self.source, "name": self.name, "arguments": self.arguments}
        return json.dumps(parts).encode()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a program and what it said before."""

    end: End  # by itself, by a signal, or for taking too much of what
    status: int  # of the exit; negative: the signal
    output: bytes  # of a script: its stdout; of a call: JSON, as the program says, unverified

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, in time and without an error."""
        return self.end == "exit" and self.status == 0
