"""nvidia-smi's tables, as its manual prints them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.preflight import nvidia
from megatron_prime.preflight.facts import Card, Driver, Tenant

CARDS = """570.124.06, GPU-11, Default, 0
570.124.06, GPU-22, Exclusive_Process, [N/A]
"""
TENANTS = """GPU-22, 4711, 1024, /usr/bin/python, with, commas
GPU-11, 42, [N/A], python
"""
WANTED = Driver(
    "570.124.06",
    (Card("GPU-11", "Default", 0), Card("GPU-22", "Exclusive_Process", None)),
    (
        Tenant("GPU-22", 4711, "/usr/bin/python, with, commas", 2**30),
        Tenant("GPU-11", 42, "python", 0),
    ),
)


def test_tables() -> None:
    assert nvidia.parsed(CARDS, TENANTS) == WANTED
    assert nvidia.parsed(CARDS, "").tenants == ()
    assert nvidia.parsed("", "") == Driver()


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.driver() == Driver()


def test_it_is_asked_for_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    (tmp_path / "cards").write_text(CARDS)
    (tmp_path / "tenants").write_text(TENANTS)
    program.write_text(
        f"#!/bin/sh\ncase $1 in --query-gpu=*) /bin/cat {tmp_path}/cards ;; *) /bin/cat "
        f"{tmp_path}/tenants ;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.driver() == WANTED
    program.write_text("#!/bin/sh\necho 'driver not loaded' >&2\nexit 9\n")
    with pytest.raises(RuntimeError, match="status 9: driver not loaded"):
        nvidia.driver()
