"""A line for each tenth in a file, a bar on a terminal."""

from __future__ import annotations

import io

from megatron_prime.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_for_each_tenth() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    for done in range(0, 1001):
        progress(done * 10**7, 10**10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[3].startswith("3.00 of 10.00 GB, ")


def test_a_terminal_gets_a_bar_that_ends_its_line() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress(5, 10)
    assert stream.getvalue().startswith(f"\r[{'#' * 20}{'.' * 20}] ")
    assert "\n" not in stream.getvalue()
    progress(10, 10)
    assert stream.getvalue().endswith("\n")
