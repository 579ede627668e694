"""Each attack of `attacks.py` is held, and the honest program after it is none the worse."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import attacks
import pytest
from attacks import (
    ATTACKS,
    HONEST,
    HONEST_S,
    HONEST_TRUTH,
    WITNESS,
    Attack,
    left_behind,
    limits,
)

import megatron_prime
from megatron_prime.verify import landlock
from megatron_prime.verify.code_tests import CodeGrader
from megatron_prime.verify.walls import Isolation

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def grader():
    grader = CodeGrader(limits(Isolation(memory_mib=256)))
    yield grader
    grader.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_held_and_costs_the_next_program_nothing(grader, attack):
    assert attack.graded_by(grader) == 0.0
    started = time.monotonic()
    assert grader.grade(HONEST, HONEST_TRUTH) == 1.0
    assert time.monotonic() - started < HONEST_S
    assert left_behind(os.getpid()) == []
    assert not os.path.lexists(WITNESS)


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def as_nobody():
    """The start of a command that runs a Python as nobody, or skip."""
    check = (
        "import subprocess, sys;"
        "sys.exit(sys.version_info < (3, 11) or subprocess.call([sys.executable, '-S', '-c', '']))"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*NOBODY, python, "-S"]
        try:
            if subprocess.run([*command, "-c", check], capture_output=True).returncode == 0:
                return command
        except OSError:  # no setpriv, or no such Python
            continue
    pytest.skip("only root can become nobody, with setpriv and a Python that nobody may start")


@pytest.mark.parametrize(
    "which", ["walls", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
@pytest.mark.parametrize("kind", ["landlock", "seccomp"])
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_they_are_held_for_every_user_and_without_landlock(user, kind, which):
    command = [sys.executable, "-S"] if user == "this user" else as_nobody()
    if kind == "landlock" and not landlock.abi():
        pytest.skip("this kernel has no Landlock")
    done = subprocess.run(
        [*command, attacks.__file__, kind, which],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(megatron_prime.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(tried) > 100
    assert [row for row in tried if row[1] != 0 or row[2] != 1 or row[4]] == []
    assert max(row[3] for row in tried) < HONEST_S


OPEN_DOORS = [
    "read a file", "read a file through libc", "list a folder", "make a socket",
    "make a Unix socket", "fork", "run a program", "become a program", "make a file in memory",
    "read its map", "change folder", "call process_vm_readv", "call io_uring_setup",
    "call eventfd2", "call pidfd_open", "call shmget",
]  # fmt: skip


@pytest.mark.parametrize("name", OPEN_DOORS)
def test_without_walls_the_attacks_succeed(name):
    """So that it is the walls that hold them, not a mistake in the attack."""
    (attack,) = [attack for attack in ATTACKS if attack.name == name] or [None]
    if attack is None:
        pytest.skip("the numbers of the calls are those of x86-64")
    grader = CodeGrader(limits(Isolation("none", memory_mib=256)))
    try:
        assert attack.graded_by(grader) == 1.0
    finally:
        grader.close()


def test_what_a_daemon_without_walls_leaves_dies_with_the_fork_server_or_its_group():
    attack = Attack("fork and stay", "import os, time\nif os.fork() == 0: time.sleep(600)\n")
    grader = CodeGrader(limits(Isolation("none", memory_mib=256)))
    attack.graded_by(grader)
    deadline = time.monotonic() + 10
    while left_behind(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(os.getpid()) == []
    grader.close()
