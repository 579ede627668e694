import json
import os
import subprocess
import sys

import pytest

from megatron_prime.verify import worker
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.worker import Check, Result

LIMITS = CodeLimits().to_json()
WORKER = [sys.executable, "-m", "megatron_prime.verify.worker", str(os.getpid()), LIMITS]
PROGRAM = "```python\nprint(int(input()) + 1)\n```"
TESTS = '{"inputs": ["1", "2"], "outputs": ["2", "4"]}'


def serve(*checks):
    lines = b"".join(check.to_line() for check in checks)
    return subprocess.run(WORKER, input=lines, capture_output=True, timeout=60, check=False)


def test_checks_in_results_out_until_the_input_ends():
    done = serve(
        Check(1, "math", "\\boxed{4}\n\ud800 ∑", "4"),
        Check(2, "math", r"\boxed{5}", "4"),
        Check(3, "poetry", r"\boxed{4}", "4"),
        Check(4, "math", r"\boxed{\frac{8}{2}}", "4"),
        Check(5, "code", PROGRAM, TESTS),
        Check(6, "code", PROGRAM, "no tests"),
    )
    ready, *results = done.stdout.splitlines(keepends=True)
    assert done.returncode == 0
    assert ready == worker.READY
    expected = [Result(1, 1.0), Result(2, 0.0), Result(3, None), Result(4, 1.0)]
    expected += [Result(5, 0.5), Result(6, None)]
    assert [Result.from_line(line) for line in results] == expected
    assert b"KeyError('poetry')" in done.stderr
    assert b"code check: ValueError('found tests that are no JSON" in done.stderr


def test_without_a_sandbox_there_is_no_reward():
    code = f"""
from megatron_prime.verify import seccomp, worker
seccomp.program = lambda machine, may_open: bytes(8)
worker.main({os.getpid()}, worker.CodeLimits())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=Check(1, "code", PROGRAM, TESTS).to_line(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert Result.from_line(done.stdout.splitlines()[1]) == Result(1, None)
    assert b"code check: SandboxUnavailable('sandbox unavailable: " in done.stderr


def test_a_print_goes_to_stderr_and_too_much_memory_is_an_error_of_the_check():
    code = f"""
import os, sys
from megatron_prime.verify import worker
def checker(response, truth):
    print("hello")
    os.system("echo hello from a child")
    return float(len(bytearray(int(response))) if response.isdigit() else 0)
worker.CHECKERS["math"] = checker
worker.main({os.getpid()}, worker.CodeLimits())
"""
    checks = [Check(1, "math", str(worker.ADDRESS_SPACE + 1), ""), Check(2, "math", "10", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=b"".join(check.to_line() for check in checks),
        capture_output=True,
        timeout=60,
        check=False,
    )
    ready, *results = done.stdout.splitlines(keepends=True)
    assert ready == worker.READY
    assert [json.loads(line)["reward"] for line in results] == [None, 10.0]
    assert b"MemoryError" in done.stderr
    assert b"hello from a child" in done.stderr


def test_it_ends_at_once_if_its_parent_is_gone():
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = subprocess.run(
        [*WORKER[:-2], str(gone.pid), LIMITS],
        input=b"",
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"is gone" in done.stderr


def test_it_imports_no_torch():
    code = """
import sys
from megatron_prime.verify import worker
assert "math_verify" not in sys.modules, "the import of the worker must be light"
assert worker.run_check(worker.Check(1, "math", r"\\boxed{0.5}", "1/2")).reward == 1.0
assert "math_verify" in sys.modules
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"7", b"nonsense", b'{"id": 1, "score": 2}'])
def test_a_line_that_is_no_result_is_refused(line):
    with pytest.raises((ValueError, TypeError)):
        Result.from_line(line)
