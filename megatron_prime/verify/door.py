"""Before a run with programs starts: can they be judged here?

Every rank asks on its own node. A sandbox that can't be built must not show as a run in which no
program is ever right; nor may tests that nobody can read.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prime.config import ConfigError, VerifySection
from megatron_prime.types import Prompt
from megatron_prime.verify import landlock
from megatron_prime.verify.code_tests import CodeLimits, parse_tests
from megatron_prime.verify.sandbox import Sandbox
from megatron_prime.verify.walls import Isolation, SandboxUnavailable

SHOWN_PROBLEMS = 20


def code_limits(knobs: VerifySection) -> CodeLimits:
    """What the configuration gives a program."""
    isolation = Isolation(knobs.sandbox, knobs.code_memory_mib, knobs.numpy)
    return CodeLimits(knobs.code_test_s, knobs.code_total_s, isolation)


def malformed_tests(prompts: Sequence[Prompt]) -> list[str]:
    """A line for each prompt whose tests can't be read, the first SHOWN_PROBLEMS of them."""
    problems = []
    for prompt in prompts:
        try:
            parse_tests(prompt.ground_truth)
        except ValueError as error:
            problems.append(f"  row {prompt.prompt_id} ({prompt.data_source}): {error}")
    hidden = len(problems) - SHOWN_PROBLEMS
    return problems[:SHOWN_PROBLEMS] + ([f"  … and {hidden} more"] if hidden > 0 else [])


def check_sandbox(knobs: VerifySection, loud: bool) -> None:
    """Build a sandbox and run a probe in it; ConfigError if that fails. Says what is weaker here.

    `loud`: whether this rank is the one that speaks.
    """
    try:
        with Sandbox(code_limits(knobs).isolation) as sandbox:
            sandbox.start()
    except SandboxUnavailable as error:
        raise ConfigError(
            f"{error}; the data has prompts of ability 'code', whose programs must not run without."
            " Use nodes with Linux 5.13 or newer (or containers that permit seccomp filters), leave"
            " these prompts out of the data or, only where the cluster itself isolates the job, set"
            ' verify.sandbox = "none"'
        ) from error
    if loud and knobs.sandbox == "none":
        print(
            'WARNING: verify.sandbox = "none": programs written by the model run with the rights of'
            " this job; they can read and write its files and use its network.",
            flush=True,
        )
    elif loud and not landlock.abi():
        print(
            "verify: this kernel has no Landlock (Linux 5.13): programs open no files at all and"
            " import only the common modules of the standard library",
            flush=True,
        )
