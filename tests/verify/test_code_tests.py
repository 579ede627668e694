import json
import time
from pathlib import Path

import pytest

from megatron_prime.verify import code_tests, landlock
from megatron_prime.verify.code_tests import CodeGrader, CodeLimits, parse_tests, program_of
from megatron_prime.verify.walls import Isolation

MBPP = Path(__file__).parents[3] / "shared/data/mbpp.jsonl"


@pytest.fixture(scope="module")
def grader():
    grader = CodeGrader(CodeLimits(test_s=2.0, isolation=Isolation(memory_mib=256)))
    yield grader
    grader.close()


def truth(inputs, outputs, name=None):
    return json.dumps({"inputs": inputs, "outputs": outputs, **({"fn_name": name} if name else {})})


def answer(program):
    return f"Some thoughts.\n\n```python\n{program}\n```\nDone."


DOUBLE = "print(2 * int(input()))"


@pytest.mark.parametrize(
    ("inputs", "outputs", "score"),
    [
        (["1\n", "2\n", "30\n"], ["2\n", "4", " 60 \n"], 1.0),
        (["1\n", "2\n", "30\n"], ["2\n", "5", "60"], 2 / 3),
        (["1\n"], ["3\n"], 0.0),
        ([["1"]], [["2"]], 1.0),  # lines
        (["x\n", "2\n"], ["2\n", "4\n"], 1 / 2),  # it raises on the first
        (["1\n"] * 10 + ["3\n"], ["2\n"] * 10 + ["7\n"], 10 / 11),  # the released code says 1.0
    ],
)
def test_scripts_score_the_fraction_of_tests(grader, inputs, outputs, score):
    assert grader.grade(answer(DOUBLE), truth(inputs, outputs)) == score


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("def f(a, b): return a + b", 1.0),
        ("class Solution:\n    def f(self, a: int, b: int) -> int: return a + b", 1.0),
        ("def f(a, b): return 3", 1 / 2),
        ("def f(a, b): return str(a + b)", 0.0),
        ("def f(a): return a", 0.0),
        ("def f(a, b): return a + b\nif __name__ == '__main__': raise SystemExit(1)", 1.0),
        ("def f(a, b):\n    print('some words')\n    return a + b", 1.0),
        ("f = lambda a, b: a + b\nprint(1/0)", 0.0),
    ],
)
def test_functions_are_called_with_the_arguments(grader, program, score):
    assert grader.grade(answer(program), truth([[1, 2], [-1, 5]], [3, 4], "f")) == score


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("pass", 0.0),
        ("import math", 0.0),
        ("class Solution:\n    pass", 0.0),
        ("from math import gcd", 1.0),
        ("def gcd(a, b): return a if b == 0 else gcd(b, a % b)", 1.0),
    ],
)
def test_a_function_that_everybody_is_given_has_to_be_written(grader, program, score):
    assert grader.grade(answer(program), truth([[4, 6]], [2], "gcd")) == score


@pytest.mark.parametrize(
    ("program", "arguments", "expected", "score"),
    [
        ("def f(x): return tuple(x)", [[1, [2]]], [1, [2]], 1.0),
        ("def f(x): return [(1, 2), (3,)]", [0], [[1, 2], [3]], 1.0),
        ("def f(x): return {1, 2}", [0], [1, 2], 0.0),  # no order
        ("def f(x): return {1: 'a'}", [0], {"1": "a"}, 1.0),
        ("def f(x): return x[3]", [{"3": "c"}], "c", 1.0),  # JSON made the key a text
        ("def f(x): return x['--3']", [{"--3": "c"}], "c", 1.0),
        ("def f(x): return None", [0], None, 1.0),
        ("def f(x): return 1 / 3", [0], 0.33333333, 1.0),
        ("def f(x): return float('nan')", [0], 0, 0.0),
        ("def f(x): return 'ü\\ud800'", [0], "ü\ud800", 1.0),
        ("import threading\ndef f(x): return threading.Lock()", [0], 0, 0.0),
    ],
)
def test_values_come_back_as_data(grader, program, arguments, expected, score):
    assert grader.grade(answer(program), truth([arguments], [expected], "f")) == score


@pytest.mark.parametrize(("last", "score"), [("9", 1.0), ("8", 0.0)])
def test_integers_of_any_length(grader, last, score):
    expected = "9" * 9_999 + last
    tests = f'{{"fn_name": "f", "inputs": [[10000]], "outputs": [{expected}]}}'
    assert grader.grade(answer("def f(n): return 10 ** n - 1"), tests) == score
    tests = truth(["10000"], [expected])
    assert grader.grade(answer("print(10 ** int(input()) - 1)"), tests) == score


def test_one_reading_of_lists_of_one_holds_for_all_tests(grader):
    wrapped = truth([[1], [2]], [[1], [2]], "f")
    assert grader.grade(answer("def f(x): return x"), wrapped) == 1.0
    assert grader.grade(answer("def f(x): return [x]"), wrapped) == 1.0
    assert grader.grade(answer("def f(x): return x if x == 1 else [x]"), wrapped) == 1 / 2
    assert grader.grade(answer("def f(x): return [x]"), truth([[1], [2]], [1, 2], "f")) == 0.0


def test_arguments_as_lines_of_json(grader):
    tests = truth(['[1, 2]\n"x"', '[]\n"y"'], ['[1, 2, "x"]', '["y"]'], "f")
    assert grader.grade(answer("def f(a, b): return a + [b]"), tests) == 1.0


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print(*sorted(Counter('abca').items()))", "('a', 2) ('b', 1) ('c', 1)"),
        ("x: List[int] = [3, 1]\nheapify(x)\nprint(x[0], gcd(4, 6), inf)", "1 2 inf"),
        ("exit()", ""),
        ("import sys\nprint(1)\nsys.exit()\nprint(2)", "1"),
        ("import sys\nsys.stdout.write(sys.stdin.read())", "7"),
        ("import os\nos.write(1, os.read(0, 9))", "7"),
        ("print(open(0).read())", "7"),
        ("print(*open('/dev/stdin'))", "7"),
        ("def main(): print(int(input()))\nif __name__ == '__main__': main()", "7"),
        ("import threading\nthreading.Thread(target=lambda: print(input())).start()", "7"),
        ("import atexit\natexit.register(print, 'end')", "end"),
        (
            "import threading, time\nprint(7)\n"
            "threading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
            "7",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor as P\nprint(*P(4).map(abs, [-7]))",
            "7",
        ),
        ("f = lambda n: n and 1 + f(n - 1)\nprint(f(50_000))", "50000"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(7).x)", "7"),
        ("import xml.etree.ElementTree as E\nprint(E.fromstring('<a>7</a>').text)", "7"),
        ("print({'b', 'a', 'c'} == set('abc'), len(str(10**9999)))", "True 10000"),
        ("import signal\nsignal.alarm(60)\nprint(sum(range(10)))", "45"),
        ("print('ü∑')", "ü∑"),
        ("import sys\nprint(7)\nsys.stdout.close()", "7"),
        ("import sys\nprint(7, flush=True)\nsys.stdout = None\nprint(8)", "7"),
        ("import io, sys\nprint(7)\nsys.stdout = io.StringIO()\nprint(8)", "7"),
        ("out = open(1, 'w')\nout.write('7')", "7"),
        ("import os\nout = os.fdopen(1, 'wb')\nout.write(b'7')", "7"),
        ("n = int(stdin.readline())\nstdout.write(dumps([n, maxsize > n]))", "[7, true]"),
        ("import os\nprint(os.path.basename(__file__))", "program.py"),
        (
            "import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.RLIM_INFINITY,) * 2)\nprint(7)",
            "7",
        ),
    ],
)
def test_honest_programs_run_as_anywhere(grader, program, output):
    if ("/dev/" in program or "xml" in program) and not landlock.abi():
        pytest.skip("without Landlock no file opens")
    assert grader.grade(answer(program), truth(["7\n"], [output])) == 1.0


def test_numbers_may_be_longer_than_expected(grader):
    program = "for _ in range(50_000): print('0.5000000000000000001')"
    assert grader.grade(answer(program), truth([""], ["0.5\n" * 50_000])) == 1.0
    program = "def f(n): return [0.5000000000000001] * n"
    assert grader.grade(answer(program), truth([[50_000]], [[0.5] * 50_000], "f")) == 1.0


def test_tests_do_not_see_each_other(grader):
    program = "import math\nprint(getattr(math, 'seen', 'no'))\nmath.seen = 'yes'"
    assert grader.grade(answer(program), truth(["", ""], ["no", "no"])) == 1.0
    program = """
from fcntl import F_GETFL, F_SETFL, fcntl
from os import O_NONBLOCK
for fd in range(3):
    print(fcntl(fd, F_GETFL) & O_NONBLOCK)
    fcntl(fd, F_SETFL, O_NONBLOCK)
"""
    assert grader.grade(answer(program), truth(["", ""], ["0 0 0"] * 2)) == 1.0


def test_right_output_is_not_enough(grader):
    tests = truth([""], ["7"])
    for end, score in {
        "": 1.0,
        "raise SystemExit": 1.0,
        "raise SystemExit(0)": 1.0,
        "raise SystemExit(1)": 0.0,
        "1/0": 0.0,
        "while True: pass": 0.0,
    }.items():
        assert grader.grade(answer(f"print(7, flush=True)\n{end}"), tests) == score, end


def test_a_grade_ends_in_time_and_tests_that_are_left_have_failed():
    grader = CodeGrader(CodeLimits(test_s=1.5, total_s=3.0))
    program = answer("import time\ntime.sleep(float(input()))\nprint('ok')")
    assert grader.grade(program, truth(["0"], ["ok"])) == 1.0
    started = time.monotonic()
    tests = truth(["0", "9", "0", "9", *["0"] * 6], ["ok"] * 10)
    score = grader.grade(program, tests)
    assert 2.9 < time.monotonic() - started < 10
    assert score == 2 / 10
    grader.close()


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```python\nold\n```\nbetter:\n```python\nnew\n```\nbye", "new"),
        ("```python\nold\n```python\nnew\n```", "new"),
        ("```python\nx = 1\n\n  y", "x = 1\n\n  y"),  # cut off
        ("```Python3  \r\nx = 1\r\n```", "x = 1"),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\nx = '`'\n```\n", "x = '`'"),
        ("```python\nprint(1)```\nThat is all.", "print(1)"),
        ("So: ```python\nx = 1\n```", "x = 1"),
        ("````python\nx = 1\n````", "x = 1"),
        ("```python\nx = '''\n  \n'''\n```", "x = '''\n  \n'''"),
        ("use a ```python block```", None),
        ("```\nx = 1\n```", None),
        ("```cpp\nint x;\n```", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_python_block(response, program):
    found = program_of(response)
    assert (None if found is None else found.strip().replace("\r", "")) == program


def test_a_response_without_a_program_scores_0(grader):
    assert grader.grade("print(2)", truth([""], ["2"])) == 0.0
    assert grader.grade("```python\n```", truth([""], ["2"])) == 0.0


def test_long_responses_cost_nothing():
    started = time.monotonic()
    for text in (
        "```python\n" * 100_000,
        "`" * 1_000_000,
        " " * 1_000_000,
        "```python" * 100_000,
        ("```python" + " " * 1000) * 1000,
        "```python\n" + "``` " * 250_000 + "x",
        "```python\n" + " \n" * 500_000,
        "```python\n" + "\n " * 500_000,
    ):
        program_of(text)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ("", "no JSON"),
        ("[1]", r"inputs: found None, wanted a list"),
        ('{"inputs": []}', "outputs: found None"),
        ('{"inputs": [], "outputs": []}', "found 0 inputs and 0 outputs.*at least one test"),
        ('{"inputs": ["1"], "outputs": ["1", "2"]}', "found 1 inputs and 2 outputs"),
        ('{"inputs": [1], "outputs": ["1"]}', "found 1 as input or output, wanted text"),
        ('{"inputs": [[1]], "outputs": [1], "fn_name": "a b"}', "fn_name: found 'a b'"),
        ('{"inputs": [7], "outputs": [1], "fn_name": "f"}', "found 7 as arguments"),
        ('{"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"}', "Expecting value"),
    ],
)
def test_tests_that_are_none_are_an_error(grader, ground_truth, message):
    with pytest.raises(ValueError, match=message):
        parse_tests(ground_truth)
    with pytest.raises(ValueError, match=message):
        grader.grade(answer("print(1)"), ground_truth)


def test_the_default_grader_and_limits_as_text():
    assert code_tests.grade(answer(DOUBLE), truth(["4"], ["8"])) == 1.0
    limits = CodeLimits(1.0, 2.0, Isolation("none", 7, numpy=True))
    assert CodeLimits.from_json(limits.to_json()) == limits


@pytest.mark.parametrize("with_landlock", [True, False])
def test_numpy_by_option(with_landlock):
    pytest.importorskip("numpy")
    program = """
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
def f(x):
    assert np.linalg.det(np.eye(2)) == 1 and np.random.default_rng(0).random() < 1
    return np.array(x).cumsum(), np.int64(3), sliding_window_view(np.arange(3), 2).sum()
"""
    tests = truth([[[1, 2]]], [[[1, 3], 3, 4]], "f")
    for allowed in (True, False):
        isolation = Isolation(numpy=allowed, landlock=with_landlock)
        grader = CodeGrader(CodeLimits(isolation=isolation))
        assert grader.grade(answer(program), tests) == float(allowed)
        grader.close()


@pytest.mark.long
@pytest.mark.skipif(not MBPP.exists(), reason=f"no {MBPP}")
def test_reference_solutions_of_mbpp_pass_and_spoilt_ones_do_not():
    """Each assert is a test: a script that ends without an error and says so has passed it."""
    grader = CodeGrader(CodeLimits(test_s=10.0))
    rows = [json.loads(line) for line in MBPP.read_text().splitlines()]
    rows = [row for row in rows if row["task_id"] != 123]  # it counts divisors for 13 s
    failed, passed = [], []
    for row in rows:
        checks = [f"{line}\nprint('passed')" for line in row["test_list"]]
        imports = "\n".join(row["test_imports"])
        runner = "import sys\nexec(compile(sys.stdin.read(), 'test', 'exec'))"
        tests = truth(checks, ["passed"] * len(checks))
        if grader.grade(answer(f"{imports}\n{row['code']}\n{runner}"), tests) != 1.0:
            failed.append(row["task_id"])
        spoilt = f"{imports}\n{row['code']}\n".replace("return", "return 0 / 0,")
        if grader.grade(answer(spoilt + runner), tests) == 1.0:
            passed.append(row["task_id"])
    grader.close()
    assert failed == []
    assert passed == []
