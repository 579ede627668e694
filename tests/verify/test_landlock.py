import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prime.verify import landlock

pytestmark = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")

# Puts itself under the rules that it gets, then opens what it is told.
CONFINED = """
import ctypes, os, sys
rules, *paths = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(446, int(rules), 0) == 0
for path in paths:
    try:
        os.close(os.open(path[1:], os.O_RDONLY if path[0] == "r" else os.O_RDWR | os.O_CREAT))
        print("yes")
    except PermissionError:
        print("no")
"""


def test_what_is_named_can_be_read_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_text("x")
    single, missing = tmp_path / "single", tmp_path / "missing"
    single.write_text("x")
    rules = landlock.ruleset([inside, single, missing], [outside])
    wanted = {
        f"r{inside}": "yes", f"r{inside}/file": "yes", f"r{single}": "yes",
        f"r{outside}": "yes", f"r{outside}/file": "no", f"r{tmp_path}": "no",
        f"w{inside}/file": "no", f"w{inside}/new": "no", f"w{outside}/new": "no",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-S", "-c", CONFINED, str(rules), *wanted],
        pass_fds=[rules],
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(rules)
    assert done.stdout.split() == list(wanted.values())


def test_a_kernel_without_it_is_version_0(monkeypatch) -> None:
    class Libc:
        def syscall(self, *_):
            return -1

    monkeypatch.setattr(landlock, "_LIBC", Libc())
    assert landlock.abi() == 0
    with pytest.raises(OSError, match="landlock_create_ruleset"):
        landlock.ruleset([])
