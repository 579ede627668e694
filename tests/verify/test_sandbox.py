import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attacks import left_behind

import megatron_prime
from megatron_prime.verify import landlock, seccomp, walls
from megatron_prime.verify.programs import Outcome, Program
from megatron_prime.verify.sandbox import OUTPUT, Sandbox
from megatron_prime.verify.walls import Isolation, SandboxUnavailable

ECHO = Program("import sys\nsys.stdout.write(sys.stdin.read())")
LOOP = Program("print(1, flush=True)\nwhile True: pass")
ALLOW_ALL = (0x06).to_bytes(2, "little") + bytes(2) + (0x7FFF0000).to_bytes(4, "little")


@pytest.fixture(scope="module", params=["landlock", "seccomp", "none"])
def sandbox(request):
    kind = "none" if request.param == "none" else "kernel"
    with Sandbox(Isolation(kind, memory_mib=256, landlock=request.param == "landlock")) as sandbox:
        yield sandbox


def server_of(sandbox):
    return sandbox.start()._process.pid


def test_what_goes_in_and_what_comes_out(sandbox):
    assert sandbox.run(ECHO, b"\x00\xff abc", 9.0) == Outcome("exit", 0, b"\x00\xff abc")
    call = Program("def f(a, *b): return [a, b]", "f", "[1, 2.5, {}]")
    assert sandbox.run(call, b"", 9.0) == Outcome("exit", 0, b"[1, [2.5, {}]]")


def test_much_goes_in(sandbox):
    long = b"x" * 10_000_000
    program = Program("import sys\nprint(len(sys.stdin.buffer.read()))")
    assert sandbox.run(program, long, 20.0).output == b"10000000\n"
    assert sandbox.run(Program(f"x = '{'y' * 10**7}'\nprint(len(x))"), b"", 20.0).ok


def test_how_programs_end(sandbox):
    for source, outcome in {
        "print(1); raise SystemExit(3)": Outcome("exit", 1, b"1\n"),
        "import os; os._exit(4)": Outcome("exit", 4, b""),
        "print(1); 1/0": Outcome("exit", 1, b"1\n"),
        "import ctypes; ctypes.string_at(0)": Outcome("killed", -signal.SIGSEGV, b""),
    }.items():
        assert sandbox.run(Program(source), b"", 9.0) == outcome
        assert not outcome.ok
    started = time.monotonic()
    assert sandbox.run(LOOP, b"", 0.5) == Outcome("timeout", -signal.SIGKILL, b"1\n")
    assert 0.5 <= time.monotonic() - started < 5


def test_a_program_without_the_time_to_begin_is_late_and_no_hole_in_the_walls(sandbox):
    for _ in range(5):
        assert sandbox.run(LOOP, b"", 0.0).end == "timeout"


def test_output_has_a_limit(sandbox):
    source = "import sys; sys.stdout.write('x' * int(input()))"
    most = OUTPUT + 100
    for count, end in ((OUTPUT + 50, "exit"), (most, "exit"), (most + 1, "output")):
        outcome = sandbox.run(Program(source), b"%d" % count, 9.0, more_output=100)
        assert outcome.end == end
        assert outcome.output.startswith(b"x" * min(count, most))


def test_memory_has_a_limit(sandbox):
    program = Program("import sys; print(len(bytearray(int(input()) << 20)))")
    assert sandbox.run(program, b"200", 9.0).ok
    assert not sandbox.run(program, b"300", 9.0).ok


def test_threads_have_a_limit(sandbox):
    source = """
import threading, time
threading.stack_size(1 << 16)
for _ in range(int(input())): threading.Thread(target=time.sleep, args=(0.3,)).start()
"""
    assert sandbox.run(Program(source), b"40", 9.0).ok
    assert sandbox.run(Program(source), b"200", 9.0).end == "threads"


def test_a_fork_server_that_was_killed_is_replaced(sandbox):
    first = server_of(sandbox)
    os.kill(first, signal.SIGKILL)
    assert sandbox.run(ECHO, b"a", 9.0).output == b"a"
    second = server_of(sandbox)
    assert second != first
    killer = threading.Timer(0.5, os.kill, (second, signal.SIGKILL))
    killer.start()
    assert sandbox.run(Program("import time; time.sleep(1); print(2)"), b"", 9.0).output == b"2\n"
    killer.join()
    assert server_of(sandbox) not in (first, second)


def test_nothing_is_left_open_or_running(sandbox):
    sandbox.run(ECHO, b"", 9.0)
    before = len(os.listdir("/proc/self/fd"))
    for seconds, program in ((9.0, ECHO), (0.2, LOOP), (9.0, Program("print('x' * 10**6)"))):
        sandbox.run(program, b"", seconds)
    assert len(os.listdir("/proc/self/fd")) == before
    assert left_behind(os.getpid()) == []
    server = server_of(sandbox)
    sandbox.close()
    sandbox.close()
    assert not Path(f"/proc/{server}").exists()


def test_a_killed_parent_takes_everything_along():
    code = """
import os, sys
from megatron_prime.verify.sandbox import Program, Sandbox
sandbox = Sandbox()
print(os.getpid(), sandbox.start()._process.pid, flush=True)
sandbox.run(Program("while True: pass"), b"", 600.0)
"""
    root = str(Path(megatron_prime.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    pid, server = map(int, parent.stdout.readline().split())
    deadline = time.monotonic() + 20
    while not left_behind(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    (program,) = left_behind(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while time.monotonic() < deadline and any(map(is_running, (server, program))):
        time.sleep(0.02)
    assert not is_running(server)
    assert not is_running(program)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_filter_that_the_kernel_refuses_closes_it(monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine, may_open: bytes(8))
    with pytest.raises(SandboxUnavailable, match=r"sandbox unavailable: .*seccomp: Invalid"):
        Sandbox().run(Program("print(open('/etc/passwd').read())"), b"", 9.0)


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")
def test_rules_that_the_kernel_refuses_close_it(monkeypatch):
    monkeypatch.setattr(walls, "_rules", lambda numpy: os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(SandboxUnavailable, match="landlock_restrict_self: "):
        Sandbox().run(ECHO, b"", 9.0)


@pytest.mark.parametrize("with_landlock", [True, False])
def test_a_wall_with_holes_closes_it(monkeypatch, with_landlock):
    monkeypatch.setattr(seccomp, "program", lambda machine, may_open: ALLOW_ALL)
    with pytest.raises(SandboxUnavailable, match="a process"):
        Sandbox(Isolation(landlock=with_landlock)).run(ECHO, b"", 9.0)


def test_an_unknown_machine_closes_it(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailable, match=r"on riscv64, wanted Linux on x86_64 or aarch64"):
        Sandbox().run(ECHO, b"", 9.0)


def test_numpy_that_is_not_there_closes_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SandboxUnavailable, match=r"verify.numpy"):
        Sandbox(Isolation(numpy=True)).run(ECHO, b"", 9.0)


def test_a_zygote_that_does_not_start_closes_it(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_prime.verify.fork_server.COMMAND", [sys.executable, "-c", ""])
    with pytest.raises(SandboxUnavailable, match="no word from the fork server"):
        Sandbox().run(ECHO, b"", 9.0)
