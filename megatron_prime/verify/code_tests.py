"""Does the program do what the tests say? The fraction of them that pass; 1.0 only if all do.

The program is the last ```python block of the response. Each test runs it anew in the sandbox: it
gets the test's input, and what it says is compared here, out of its reach (`outputs.py`). It must
end by itself, in time and without an error; right output alone is not enough. Tests for which the
time of the whole grade does not suffice count as failed.

The ground truth is that of Eurus-2-RL-Data, `{"inputs": […], "outputs": […]}` as JSON: stdin and
stdout, or with `fn_name` arguments and returned value of a function (or of a method of `Solution`).
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_prime.verify.outputs import read_value, same_text, same_value
from megatron_prime.verify.programs import Program
from megatron_prime.verify.sandbox import Sandbox
from megatron_prime.verify.walls import Isolation

_OPENING = re.compile(r"```python3?[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(r"^[ \t]*```|```[ \t]*\r?$", re.MULTILINE)  # some forget the last newline
_INDENTED = re.compile(r"\s*\n[ \t]")
LONG_NUMBER = 24  # bytes; a float that is printed in full, where the test has a short one


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """What a response's program gets."""

    test_s: float = 5.0  # wall-clock seconds of one test
    total_s: float = 50.0  # of all tests together
    isolation: Isolation = field(default_factory=Isolation)

    def to_json(self) -> str:
        """For a worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CodeLimits:
        """What `to_json` wrote."""
        parts = json.loads(text)
        return cls(**parts | {"isolation": Isolation(**parts["isolation"])})


@dataclass(frozen=True, slots=True)
class Tests:
    """The parsed ground truth; as many inputs as outputs, and at least one."""

    name: str | None  # of the function to call; None: the program reads stdin
    inputs: tuple[str, ...]  # stdin, or a JSON list of arguments
    outputs: tuple[Any, ...]  # the text, or the value


class CodeGrader:
    """Grades one response after the other in a sandbox of its own; call `close` in the end."""

    def __init__(self, limits: CodeLimits | None = None) -> None:
        self._limits = limits or CodeLimits()
        self._sandbox = Sandbox(self._limits.isolation)

    def grade(self, response: str, ground_truth: str) -> float:
        """Passed tests / tests; 0 for a response without a program.

        Raises ValueError for a ground truth that is none, and SandboxUnavailable.
        """
        tests, source = parse_tests(ground_truth), program_of(response)
        if source is None:
            return 0.0
        self._sandbox.start()  # not on the program's time
        deadline = time.monotonic() + self._limits.total_s
        passed = wrapped = 0
        for given, expected in zip(tests.inputs, tests.outputs, strict=True):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            as_is, in_list = self._test(source, tests.name, given, expected, left)
            passed, wrapped = passed + as_is, wrapped + in_list
        return max(passed, wrapped) / len(tests.inputs)

    def close(self) -> None:
        """End the sandbox. May be called again; `grade` starts another."""
        self._sandbox.close()

    def _test(
        self, source: str, name: str | None, given: str, expected: Any, left: float
    ) -> tuple[bool, bool]:
        """Whether the output is as expected, and whether it is if what was expected is in a list.

        Some sets put each returned value into a list of one, some don't, and none says so. One
        reading must hold for all tests of a problem.
        """
        program = Program(source) if name is None else Program(source, name, given)
        stdin = given.encode(errors="replace") if name is None else b""
        text = json.dumps(expected, default=str)
        parts = text.count(",") if name is not None else len(expected.split())
        room = 2 * len(text) + LONG_NUMBER * parts
        outcome = self._sandbox.run(program, stdin, min(self._limits.test_s, left), room)
        if not outcome.ok:
            return False, False
        if name is None:
            return same_text(outcome.output.decode(errors="replace"), expected), False
        try:
            value = read_value(outcome.output)
        except ValueError:  # the program wrote it itself, or ended before it returned
            return False, False
        is_single = isinstance(expected, list) and len(expected) == 1
        return same_value(value, expected), is_single and same_value(value, expected[0])


@functools.cache
def _grader() -> CodeGrader:
    return CodeGrader()


def grade(response: str, ground_truth: str) -> float:
    """As CodeGrader.grade, with the default limits; one thread at a time."""
    return _grader().grade(response, ground_truth)


def program_of(response: str) -> str | None:
    """What stands in the ```python block that opens last, closed or not; None if there is none."""
    last = None
    for last in _OPENING.finditer(response):  # noqa: B007
        pass
    if last is None:
        return None
    closing = _CLOSING.search(response, last.end())
    source = response[last.end() : closing.start() if closing else None]
    # `dedent` also empties lines of white space, which may be a part of the program's strings.
    return textwrap.dedent(source) if _INDENTED.match(source) else source


def parse_tests(ground_truth: str) -> Tests:
    """Read the JSON; ValueError says what was found and what was wanted."""
    try:
        truth = read_value(ground_truth)
    except ValueError as error:
        raise ValueError(f"found tests that are no JSON ({error}), wanted an object") from error
    inputs, outputs = (_list(truth, key) for key in ("inputs", "outputs"))
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(
            f"found {len(inputs)} inputs and {len(outputs)} outputs, wanted as many of both and at"
            " least one test"
        )
    name = truth.get("fn_name")
    if name is None:
        return Tests(None, tuple(map(_text, inputs)), tuple(map(_text, outputs)))
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"fn_name: found {name!r}, wanted the name of a function")
    calls = [_call(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
    return Tests(name, tuple(given for given, _ in calls), tuple(value for _, value in calls))


def _list(truth: Any, key: str) -> list[Any]:
    found = truth.get(key) if isinstance(truth, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{key}: found {found!r:.80}, wanted a list")
    return found


def _text(value: Any) -> str:
    """Stdin or stdout, which some sets give as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"found {value!r:.80} as input or output, wanted text")
    return value


def _call(given: Any, expected: Any) -> tuple[str, Any]:
    """Arguments as a JSON list, and the value; some sets give both as text, an argument a line."""
    if isinstance(given, list):
        try:
            return json.dumps(given), expected
        except TypeError as error:
            raise ValueError(f"found arguments {given!r:.80} with too long integers") from error
    if not (isinstance(given, str) and isinstance(expected, str)):
        raise ValueError(f"found {given!r:.80} as arguments, wanted a list, or lines of JSON")
    lines = [line for line in given.split("\n") if line.strip()]
    for line in lines:
        read_value(line)
    return f"[{','.join(lines)}]", read_value(expected)
