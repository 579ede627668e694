from __future__ import annotations

import pytest
import torch

from megatron_prime.planner.residency import NEEDED, PHASES
from megatron_prime.runtime.ledger import Ledger, LedgerError, Limits, knob
from megatron_prime.runtime.memory import Buffer, Kept, Storages

GIB = 2**30


def ledger_of(planned, work=None, **tensors):
    buffers = {
        name.replace("__", "."): Buffer(name.replace("__", "."), Storages(Kept, lambda t=t: [t]))
        for name, t in tensors.items()
    }
    return Ledger(Limits(NEEDED, None, planned, work or {}), buffers), buffers


def test_what_is_there_is_counted() -> None:
    ledger, _ = ledger_of({}, prm__weights=torch.zeros(10), policy__weights=torch.zeros(1))
    assert ledger.check("score", frozenset({"prm.weights", "policy.weights"})) == 44


def test_freed_means_freed() -> None:
    ledger, buffers = ledger_of({}, prm__weights=torch.zeros(10), policy__weights=torch.zeros(1))
    with pytest.raises(
        LedgerError, match=r"prm.weights has 40 bytes on the device in score, wanted 0"
    ):
        ledger.check("score", frozenset({"policy.weights"}))
    (piece,) = buffers["prm.weights"].pieces
    piece.put_away()
    piece.free()
    assert ledger.check("score", frozenset({"policy.weights"})) == 4
    with pytest.raises(LedgerError, match=r"prm.weights has 0 bytes on the device in .*wanted 40"):
        ledger.check("checkpoint", frozenset({"policy.weights", "prm.weights"}))


def test_the_plan_must_be_right_within_a_hundredth() -> None:
    there = frozenset({"prm.weights"})
    for planned, right in ((400, True), (397, True), (404, True), (395, False), (410, False)):
        ledger, _ = ledger_of({"prm.weights": planned}, prm__weights=torch.zeros(100))
        if right:
            assert ledger.check("update_prm", there) == 400
        else:
            with pytest.raises(LedgerError, match=f"has 400 bytes, but {planned} were planned"):
                ledger.check("update_prm", there)


def test_moments_come_late_and_fp8_is_not_checked() -> None:
    ledger, _ = ledger_of(
        {"prm.moments": 800, "prm.fp8_copies": 9},
        prm__moments=torch.zeros(0),
        prm__fp8_copies=torch.zeros(100),
    )
    assert ledger.check("update_prm", frozenset({"prm.moments", "prm.fp8_copies"})) == 400


def test_the_table_holds_planned_and_measured_bytes_largest_first() -> None:
    ledger, buffers = ledger_of(
        {"prm.weights": 2 * GIB, "policy.weights": GIB // 2, "prm.moments": 5 * GIB},
        {"score": 3 * GIB},
        prm__weights=torch.empty(2 * GIB, dtype=torch.uint8),
        policy__weights=torch.empty(GIB // 2, dtype=torch.uint8),
    )
    lines = ledger.table("update_prm").splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["GiB", "in", "update_prm", "planned", "device", "host"],
        ["prm.weights", "2.000", "2.000", "0.000"],
        ["policy.weights", "0.000", "0.500", "0.000"],
        ["prm.moments", "5.000", "0.000", "0.000"],
        ["work", "of", "the", "phase", "0.000"],
    ]
    assert lines[5].startswith("what would help: prm.micro_batch_tokens")
    assert "3.000" in ledger.table("score").splitlines()[-2]
    del buffers


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_has_a_knob_that_exists(phase) -> None:
    from megatron_prime.config import RunConfig

    tables = RunConfig.model_fields
    for word in knob(phase).replace(",", " ").replace(";", " ").split():
        table, dot, field = word.partition(".")
        if dot and table in tables and table != "sglang":
            assert field in tables[table].annotation.model_fields
