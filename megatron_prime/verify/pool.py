"""Outcome rewards from a pool of checker processes, while the rollouts still come in.

Each check has so much wall-clock time from the moment a ready worker gets it: `timeout_s`, or for a
program that of all its tests and SLACK_S. A worker that takes longer or dies is replaced, its check
scores 0 and is counted: a failure must never look like a half-right answer.
"""

from __future__ import annotations

import itertools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import megatron_prime
from megatron_prime.protocols import Tally
from megatron_prime.runtime.signals import block_stop_signals
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Group, VerifiedGroup
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.worker import READY, SUPPORTED_ABILITIES, Check, Result

START_TIMEOUT_S = 300.0  # a cold shared file system can take minutes over the imports
SLACK_S = 10.0  # beyond the tests' own time: for starting a sandbox and for killing a program


class VerifierPool:
    """The Verifier role on `workers` processes; a context manager, else call `close`.

    `command` starts a worker that speaks as `worker.py` does; the default is that module.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        command: Sequence[str] | None = None,
        timeline: Timeline | None = None,
        code: CodeLimits | None = None,
    ) -> None:
        code = code or CodeLimits()
        if command is None:
            module, parent = "megatron_prime.verify.worker", str(os.getpid())
            command = (sys.executable, "-m", module, parent, code.to_json())
        self._timeout_s = {"math": timeout_s, "code": code.total_s + SLACK_S}
        self._timeline = timeline or Timeline()
        self._ids = itertools.count()
        self._workers = [_Worker(command) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        # Workers die with the thread that started them (Linux), so only these threads start any.
        self._threads = ThreadPoolExecutor(
            workers, thread_name_prefix="verifier", initializer=block_stop_signals
        )
        try:
            for worker in self._workers:
                self._threads.submit(worker.start).result()
                self._idle.put(worker)
        except OSError:
            self.close()
            raise

    def verify(self, groups: Iterable[Group], enough: Tally | None = None) -> list[VerifiedGroup]:
        """Score all rollouts, each from the moment its group comes out of `groups`; order is kept.

        `enough` gets each group as soon as its last check is done, in a thread of the pool. Raises
        ValueError for an ability without a checker, RuntimeError if workers can't be started, and
        whatever `groups` and `enough` raise; the pool can be used again after it.
        """
        submitted: list[tuple[_Checked, list[Future[None]]]] = []
        try:
            for group in groups:
                checked = _Checked(group, enough)
                submitted.append((checked, self._submit(checked)))
            for _, futures in submitted:
                for future in futures:
                    future.result()
            return [checked.verified() for checked, _ in submitted]
        finally:
            for _, futures in submitted:
                for future in futures:
                    future.cancel()  # without effect on what is done

    def close(self) -> None:
        """End all workers, in the middle of a check if need be. May be called again.

        A `verify` in another thread raises CancelledError.
        """
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()  # the checks that run are over
        self._threads.shutdown()  # nobody waits on a pipe or starts a process any more
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, checked: _Checked) -> list[Future[None]]:
        prompt = checked.group.prompt
        if prompt.ability not in SUPPORTED_ABILITIES:
            supported = ", ".join(SUPPORTED_ABILITIES)
            raise ValueError(
                f"prompt {prompt.prompt_id} of {prompt.data_source}: found ability"
                f" {prompt.ability!r}, wanted one with a checker ({supported});"
                " leave the others out of the data"
            )
        self._timeline.checking()
        return [
            self._threads.submit(
                self._check,
                checked,
                sample,
                Check(next(self._ids), prompt.ability, rollout.text, prompt.ground_truth),
            )
            for sample, rollout in enumerate(checked.group.rollouts)
        ]

    def _check(self, checked: _Checked, sample: int, check: Check) -> None:
        """Runs in one of the pool's threads."""
        worker = self._idle.get()
        try:
            reward = worker.run(check, self._timeout_s[check.ability])
        finally:
            self._idle.put(worker)
        checked.take(sample, reward)
        self._timeline.checked()


class _Checked:
    """A group whose checks are under way; counted when the last is done."""

    def __init__(self, group: Group, enough: Tally | None) -> None:
        self.group = group
        self._enough = enough
        self._rewards: list[float | None] = [None] * len(group.rollouts)
        self._left = len(group.rollouts)
        self._lock = threading.Lock()

    def take(self, sample: int, reward: float | None) -> None:
        """The reward of a rollout; None for a checker failure."""
        with self._lock:
            self._rewards[sample] = reward
            self._left -= 1
            is_last = self._left == 0
        if is_last and self._enough is not None:
            self._enough.add(self.verified())

    def verified(self) -> VerifiedGroup:
        """The group with its rewards, when all are there."""
        return VerifiedGroup(
            prompt=self.group.prompt,
            rollouts=self.group.rollouts,
            outcome_rewards=tuple(0.0 if reward is None else reward for reward in self._rewards),
            checker_failures=self._rewards.count(None),
        )


class _Worker:
    """A checker process and its successors; for one thread at a time, except `kill`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def start(self) -> None:
        """Start a process without waiting until it is ready."""
        self._ready = False
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=Path(megatron_prime.__file__).parents[1],  # where `-m` finds the package
        )
        assert self._process.stdin is not None, "it was started with a pipe"
        os.set_blocking(self._process.stdin.fileno(), False)

    def run(self, check: Check, timeout_s: float) -> float | None:
        """The reward of `check`; None, and a new process, if this one hangs, dies or babbles.

        RuntimeError if the process doesn't get ready, for the next one wouldn't either.
        """
        if not self._ready:
            self._wait_until_ready()
        try:
            result = Result.from_line(self._exchange(check.to_line(), timeout_s))
            if result.id != check.id:
                raise ValueError(f"found the result of check {result.id}, wanted {check.id}")
        except (OSError, EOFError, ValueError, TypeError):  # this check's failure, counted as such
            self._replace()
            return None
        return result.reward

    def kill(self) -> None:
        """Kill the process; a thread that waits for its answer sees the end of it."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Kill the process, reap it and close its pipes."""
        process = self._process
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _wait_until_ready(self) -> None:
        try:
            line = self._exchange(b"", START_TIMEOUT_S)
            if line != READY:
                raise ValueError(f"found {line!r}, wanted {READY!r}")
        except (OSError, EOFError, ValueError) as error:
            self._replace()
            raise RuntimeError(
                f"a verifier worker did not get ready ({error}); its messages are on stderr; try"
                f" it by hand: {' '.join(self._command)}"
            ) from error
        self._ready = True

    def _exchange(self, request: bytes, timeout_s: float) -> bytes:
        """Send `request`, return the answer's line; OSError or EOFError if none comes in time."""
        process = self._process
        assert process is not None, "only `start` makes a worker that is run"
        assert process.stdin is not None, "it was started with a pipe"
        assert process.stdout is not None, "it was started with a pipe"
        stdin, stdout = process.stdin.fileno(), process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        if request:
            poll.register(stdin, select.POLLOUT)
        answer = b""
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            ready = [descriptor for descriptor, _ in poll.poll(max(left, 0.0) * 1000)]
            if not ready:
                raise TimeoutError(f"no answer in {timeout_s} s")
            if stdin in ready:
                request = request[os.write(stdin, request) :]
                if not request:
                    poll.unregister(stdin)
            if stdout in ready:
                chunk = os.read(stdout, 65536)
                if not chunk:
                    raise EOFError(f"exit status {process.wait()}")
                answer += chunk
        return answer

    def _replace(self) -> None:
        self.stop()
        self.start()
