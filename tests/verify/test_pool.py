import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from megatron_prime import protocols
from megatron_prime.types import Group, Prompt, Rollout
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.pool import VerifierPool

# Speaks the worker's protocol; what it does with a check is the first word of the response.
FAKE_WORKER = """
import json, os, sys, time
time.sleep(float(sys.argv[1]))
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    check = json.loads(line)
    what, _, rest = check["response"].partition(" ")
    if what == "hang": time.sleep(600)
    if what == "crash": os._exit(3)
    if what == "babble": print("hello", flush=True); continue
    if what == "mix": check["id"] += 1
    if what == "deaf":
        print(json.dumps({"id": check["id"], "reward": 1.0}), flush=True)
        time.sleep(600)
    if what == "sleep": time.sleep(float(rest))
    if what == "touch": open(rest, "w").close()
    reward = None if what == "raise" else float(rest == check["ground_truth"])
    print(json.dumps({"id": check["id"], "reward": reward}), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path):
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER)
    return lambda start_s=0: [sys.executable, "-I", "-S", str(script), str(start_s)]


@pytest.fixture(scope="module")
def real_pool():
    with VerifierPool(workers=2, timeout_s=2.0, code=CodeLimits(test_s=2.0)) as pool:
        yield pool


def group(*texts, number=0, truth="yes", ability="math"):
    prompt = Prompt(number, (1,), truth, ability, "test")
    return Group(prompt, tuple(Rollout((2,), (0.0,), "stop", 0, text) for text in texts))


def children():
    """Pids of this process's children, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has gone since the listing
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone
        return False


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_order_of_groups_and_rollouts_is_kept(fake_worker):
    groups = [
        group(f"sleep {0.05 * (i % 3)}", f"say {i}", "say no", number=i, truth=str(i))
        for i in range(9)
    ]
    with VerifierPool(3, 20.0, fake_worker()) as pool:
        verifier: protocols.Verifier = pool
        verified = verifier.verify(iter(groups))
    assert [(v.prompt, v.rollouts) for v in verified] == [(g.prompt, g.rollouts) for g in groups]
    assert [v.outcome_rewards for v in verified] == [(0.0, 1.0, 0.0)] * 9
    assert [v.checker_failures for v in verified] == [0] * 9


@pytest.mark.parametrize("failure", ["hang", "crash", "babble", "mix", "raise"])
def test_a_failing_check_scores_0_is_counted_and_costs_no_other(fake_worker, failure):
    with VerifierPool(1, 1.0, fake_worker()) as pool:
        (first,) = pool.verify([group("say yes", failure, "say yes", f"{failure} yes", "say yes")])
        (second,) = pool.verify([group("say yes")])
    assert first.outcome_rewards == (1.0, 0.0, 1.0, 0.0, 1.0)
    assert first.checker_failures == 2
    assert (second.outcome_rewards, second.checker_failures) == ((1.0,), 0)


def test_a_hanging_check_is_killed_at_its_time_and_its_worker_replaced(fake_worker):
    before = children()
    with VerifierPool(1, 0.4, fake_worker()) as pool:
        pool.verify([group("say yes")])
        (old,) = children() - before
        started = time.perf_counter()
        pool.verify([group("hang")])
        assert 0.4 <= time.perf_counter() - started < 5
        (new,) = children() - before
        assert new != old


def test_a_worker_that_reads_no_more_than_a_pipe_holds_is_killed_too(fake_worker):
    with VerifierPool(1, 1.0, fake_worker()) as pool:
        deaf, long = "deaf", "say " + "x" * 1_000_000
        (verified,) = pool.verify([group(deaf, long, long[:-1], truth=long[4:-1])])
    assert verified.outcome_rewards == (1.0, 0.0, 1.0)
    assert verified.checker_failures == 1


def test_the_time_of_starting_does_not_count(fake_worker):
    with VerifierPool(1, 1.0, fake_worker(1.5)) as pool:
        (verified,) = pool.verify([group("crash", "say yes")])
    assert verified.outcome_rewards == (0.0, 1.0)
    assert verified.checker_failures == 1


def test_checking_overlaps_generation(fake_worker, tmp_path):
    mark = tmp_path / "checked"
    seen = []

    def generate():
        yield group(f"touch {mark}")
        seen.append(wait_for(mark.exists))
        yield group("say yes")

    with VerifierPool(1, 20.0, fake_worker()) as pool:
        assert len(pool.verify(generate())) == 2
    assert seen == [True]


class Seen:
    """A tally that keeps what it is told, and by which threads."""

    def __init__(self):
        self.groups, self.threads = [], set()

    def add(self, group):
        self.groups.append(group)
        self.threads.add(threading.current_thread())

    def reached(self):
        return False


def test_a_group_is_told_when_its_last_check_is_done_while_others_are_generated(fake_worker):
    seen = Seen()

    def generate():
        for number in range(3):
            yield group("sleep 0.05", "say yes", "crash", number=number)
            assert wait_for(lambda number=number: len(seen.groups) == number + 1)

    with VerifierPool(2, 20.0, fake_worker()) as pool:
        verified = pool.verify(generate(), seen)
    assert seen.groups == verified, "each once, with all rewards"
    assert [v.outcome_rewards for v in verified] == [(0.0, 1.0, 0.0)] * 3
    assert [v.checker_failures for v in verified] == [1] * 3
    assert threading.main_thread() not in seen.threads


def test_groups_are_told_once_each_however_their_checks_overlap(fake_worker):
    groups = [group(*["say yes", "say no"] * 3, number=n) for n in range(20)]
    seen = Seen()
    with VerifierPool(4, 20.0, fake_worker()) as pool:
        verified = pool.verify(iter(groups), seen)
    assert sorted(v.prompt.prompt_id for v in seen.groups) == list(range(20))
    assert sorted(seen.groups, key=lambda v: v.prompt.prompt_id) == verified


def test_an_exception_of_the_tally_passes(fake_worker):
    class Lost(Seen):
        def add(self, group):
            raise ConnectionError("the store is gone")

    with VerifierPool(2, 20.0, fake_worker()) as pool:
        with pytest.raises(ConnectionError, match="the store is gone"):
            pool.verify([group("say yes", "say no")], Lost())
        assert pool.verify([group("say yes")])[0].outcome_rewards == (1.0,)


def test_checks_run_side_by_side(fake_worker):
    with VerifierPool(4, 20.0, fake_worker()) as pool:
        pool.verify([group(*["say yes"] * 8)])
        started = time.perf_counter()
        pool.verify([group(*["sleep 0.5"] * 4)])
        assert time.perf_counter() - started < 1.5


def test_an_exception_of_the_generator_passes_and_the_pool_stays_usable(fake_worker):
    before = children()

    def generate():
        yield group(*["sleep 0.05"] * 200)
        raise KeyError("generation failed")

    with VerifierPool(1, 20.0, fake_worker()) as pool:
        with pytest.raises(KeyError, match="generation failed"):
            pool.verify(generate())
        started = time.perf_counter()
        assert pool.verify([group("say yes")])[0].outcome_rewards == (1.0,)
        assert time.perf_counter() - started < 5, "the other checks should have been cancelled"
    assert children() == before


def test_an_ability_without_a_checker_is_refused(fake_worker):
    with (
        VerifierPool(1, 20.0, fake_worker()) as pool,
        pytest.raises(
            ValueError, match=r"prompt 7 of test: found ability 'poetry'.*\(math, code\)"
        ),
    ):
        pool.verify([group("say yes", number=7, ability="poetry")])


def test_a_worker_that_can_not_start_is_an_error_not_a_reward():
    command = [sys.executable, "-I", "-S", "-c", "raise SystemExit(9)"]
    before = children()
    with (
        VerifierPool(2, 20.0, command) as pool,
        pytest.raises(RuntimeError, match="exit status 9"),
    ):
        pool.verify([group("say yes", "say yes")])
    assert children() == before


def test_a_command_that_does_not_exist_leaves_nothing_behind():
    threads = threading.active_count()
    with pytest.raises(FileNotFoundError):
        VerifierPool(2, 20.0, ["/no/such/program"])
    assert threading.active_count() == threads


def test_close_ends_everything_in_the_middle_of_checks(fake_worker):
    before, threads = children(), threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    pool = VerifierPool(3, 600.0, fake_worker())
    assert len(children() - before) == 3

    def generate():
        yield group(*["hang"] * 10)
        time.sleep(0.3)
        raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), pool:
        pool.verify(generate())
    pool.close()
    assert time.perf_counter() - started < 10
    assert children() == before
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_close_from_another_thread_ends_verify(fake_worker):
    before = children()
    pool = VerifierPool(2, 600.0, fake_worker())
    closing = threading.Timer(0.3, pool.close)
    closing.start()
    with pytest.raises(CancelledError):
        pool.verify([group(*["hang"] * 10)])
    closing.join(timeout=10)
    assert not closing.is_alive()
    assert children() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers end with their stdin")
def test_workers_die_with_a_killed_parent_even_in_the_middle_of_a_check(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from test_pool import VerifierPool, children, group
def generate():
    yield group(*[r"\\boxed{{9^{{9^{{9^{{9}}}}}}}}"] * 2)
    time.sleep(1)
    print(*children(), flush=True)
    time.sleep(600)
pool = VerifierPool(2, 600.0)
pool.verify([group(*[r"\\boxed{{0.5}}"] * 20, truth="1/2")])
pool.verify(generate())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    try:
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    assert wait_for(lambda: not any(is_running(pid) for pid in pids))


def test_a_sympy_tower_hangs_only_its_own_check(real_pool):
    tower = r"\boxed{9^{9^{9^{9}}}}"
    (verified,) = real_pool.verify([group(tower, r"\boxed{\frac{14}{6}}", "no box", truth="7/3")])
    assert verified.outcome_rewards == (0.0, 1.0, 0.0)
    assert verified.checker_failures == 1


def test_programs_go_to_the_sandbox(real_pool):
    def program(source):
        return f"```python\n{source}\n```"

    tests = '{"inputs": ["1", "2"], "outputs": ["2", "4"]}'
    right, half = program("print(2 * int(input()))"), program("print(2)")
    endless = program("print(2 * int(input()))\nwhile True: pass")
    code = group(right, half, endless, "no program", truth=tests, ability="code")
    (math, verified) = real_pool.verify([group(r"\boxed{7}", truth="7"), code])
    assert math.outcome_rewards == (1.0,)
    assert verified.outcome_rewards == (1.0, 0.5, 0.0, 0.0)
    assert verified.checker_failures == 0, "an endless program is a wrong one, not a failed check"
    (verified,) = real_pool.verify([group(right, truth='{"inputs": []}', ability="code")])
    assert (verified.outcome_rewards, verified.checker_failures) == ((0.0,), 1)


def test_programs_have_the_time_of_all_their_tests(fake_worker):
    with VerifierPool(1, 0.3, fake_worker(), code=CodeLimits(total_s=20.0)) as pool:
        (code,) = pool.verify([group("sleep 1", ability="code")])
        (math,) = pool.verify([group("sleep 1")])
    assert (code.checker_failures, math.checker_failures) == (0, 1)


def test_two_thousand_integer_answers_take_seconds(real_pool):
    real_pool.verify([group(*[r"\boxed{\frac{1}{2}}"] * 20, truth="0.5")])  # both are up
    groups = [
        group(*(rf"\boxed{{{i + j}}}" for j in range(4)), number=i, truth=str(i))
        for i in range(500)
    ]
    started = time.perf_counter()
    verified = real_pool.verify(groups)
    assert time.perf_counter() - started < 10
    assert {v.outcome_rewards for v in verified} == {(1.0, 0.0, 0.0, 0.0)}
    assert sum(v.checker_failures for v in verified) == 0
