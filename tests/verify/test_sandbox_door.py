import json

import pytest

from megatron_prime.config import ConfigError, VerifySection
from megatron_prime.types import Prompt
from megatron_prime.verify import door, landlock, seccomp
from megatron_prime.verify.code_tests import CodeLimits
from megatron_prime.verify.walls import Isolation


def prompts(*truths):
    return [Prompt(i, (1,), truth, "code", "apps") for i, truth in enumerate(truths)]


def test_the_knobs_of_programs():
    knobs = VerifySection(
        code_test_s=1.5, code_total_s=9.0, code_memory_mib=300, numpy=True, sandbox="none"
    )
    assert door.code_limits(knobs) == CodeLimits(1.5, 9.0, Isolation("none", 300, numpy=True))
    assert door.code_limits(VerifySection()) == CodeLimits()


def test_tests_that_can_not_be_read_are_listed():
    good = json.dumps({"inputs": [""], "outputs": [""]})
    found = door.malformed_tests(prompts(good, '{"inputs": [], "outputs": []}', good, "x"))
    assert [line.partition(":")[0] for line in found] == ["  row 1 (apps)", "  row 3 (apps)"]
    assert "at least one test" in found[0]
    assert door.malformed_tests(prompts(*["x"] * 25))[20:] == ["  … and 5 more"]


def test_a_sandbox_that_stands_is_no_matter(capsys):
    door.check_sandbox(VerifySection(), loud=True)
    said = capsys.readouterr().out
    assert said == "" if landlock.abi() else "no Landlock" in said


def test_one_that_does_not_stand_refuses_the_run_with_the_knob(monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine, may_open: bytes(8))
    with pytest.raises(ConfigError, match=r'sandbox unavailable: .* verify.sandbox = "none"'):
        door.check_sandbox(VerifySection(), loud=False)


def test_none_is_loud_on_one_rank(capsys):
    door.check_sandbox(VerifySection(sandbox="none"), loud=False)
    assert capsys.readouterr().out == ""
    door.check_sandbox(VerifySection(sandbox="none"), loud=True)
    assert capsys.readouterr().out.startswith('WARNING: verify.sandbox = "none": programs written')


def test_a_kernel_without_landlock_is_told(monkeypatch, capsys):
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    door.check_sandbox(VerifySection(), loud=True)
    assert "no Landlock" in capsys.readouterr().out
