"""The JSON's form, and that the table says the same."""

from __future__ import annotations

import json
from pathlib import Path

from planned_runs import run_config

from megatron_prime.planner.advice import advise
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.report import as_json, as_table, short_table
from megatron_prime.planner.residency import NEEDED, RESIDENT


def test_json_and_table_agree(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        "Llama-3-70B",
        megatron={"tensor_model_parallel_size": 8, "sequence_parallel": True},
    )
    plan = make_plan(config, 16, Machine(), RESIDENT)
    advice = advise(config, 16, Machine())
    found = json.loads(json.dumps(as_json(plan, advice)))
    assert {"ranks", "phases", "fits"} <= found.keys()
    assert [rank["rank"] for rank in found["ranks"]] == list(range(16))
    first = found["ranks"][0]
    assert first.keys() == {"rank", "tp", "pp", "dp", "cp", "parameters", "bytes"}
    assert first["bytes"]["policy.weights"] >= 2 * first["parameters"]
    assert found["fits"] is False
    assert found["peak"]["device_bytes"] == max(p["device_bytes"] for p in found["phases"])
    for phase in found["phases"]:
        parts = [*phase["resident"].values(), *phase["working"].values()]
        assert phase["device_bytes"] == sum(parts)
    offloaded = make_plan(config, 16, Machine(), NEEDED)
    found = json.loads(json.dumps(as_json(offloaded)))
    assert {phase["host_bytes"] for phase in found["phases"]} == {found["host_bytes"]}
    assert found["node_host_bytes"] == 8 * found["host_bytes"] == 8 * offloaded.host_bytes > 0
    host = f"{offloaded.host_bytes / GIB:.2f} GiB on the rank that has most, "
    node = f"{8 * offloaded.host_bytes / GIB:.2f} GiB at most on a node of 8"
    assert host + node in short_table(offloaded, [])
    table = as_table(plan, advice)
    assert f"DOES NOT FIT: {plan.peak.device / GIB:.2f} GiB in {plan.peak.phase}" in table
    assert advice[0].change in table
    for phase in plan.phases:
        assert f"{phase.phase:16}" in table
