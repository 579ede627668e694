"""Every check finds what is wrong, and where; a healthy run has no problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import NEEDS, VERSIONS, facts, healthy, spoil, timings

from megatron_prime.preflight.checks import problems_of
from megatron_prime.preflight.checks_network import slow_ones
from megatron_prime.preflight.checks_same import odd_ones
from megatron_prime.preflight.collectives import ALL, NODE, PAIRS
from megatron_prime.preflight.facts import (
    GIB,
    Card,
    Clock,
    Disk,
    Driver,
    Gpu,
    Limits,
    Memory,
    Reduced,
    Source,
    Tenant,
    Timing,
)
from megatron_prime.preflight.findings import Findings, Problem, where


def only(found: Findings) -> Problem:
    """The one problem that there is."""
    problems = problems_of(found)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (8, 8), (4, 2), (6, 2), (128, 8)])
def test_health(ranks: int, per_node: int) -> None:
    assert problems_of(healthy(ranks, per_node)) == []


def test_ranks_that_did_not_come() -> None:
    found = healthy(16, 8)
    found.seats = {rank: seat for rank, seat in found.seats.items() if rank < 8}
    found.facts = {rank: one for rank, one in found.facts.items() if rank < 8}
    found.clocks = found.hub = {}
    found.shared, found.stages, found.reduced, found.at = {0: ""}, (), {}, {}
    problem = only(found)
    assert problem.refuses
    assert where(problem.ranks, found.seats) == "ranks 8–15"
    assert problem.found == "did not come within 40 s"


def test_a_rank_that_came_and_fell_silent() -> None:
    found = healthy()
    found.facts = {rank: one for rank, one in found.facts.items() if rank != 3}
    found.stages = ()
    problem = only(found)
    assert (problem.ranks, problem.found) == ((3,), "came, but told nothing")
    assert where(problem.ranks, found.seats) == "rank 3 on gpu01"


def test_ranks_dealt_out_in_turn() -> None:
    found = healthy()
    found.seats = {r: replace(s, node=f"gpu{r % 2}") for r, s in found.seats.items()}
    cyclic = [one for one in problems_of(found) if "--distribution=block" in one.mend]
    assert [one.ranks for one in cyclic] == [(0, 2), (1, 3)]


def test_the_odd_one_is_who_differs_from_most() -> None:
    assert odd_ones({0: "a", 1: "a"}) == []
    assert odd_ones({}) == []
    assert odd_ones({0: "b", 1: "a", 2: "a"}) == [(0, "b", "a", 2)]
    assert odd_ones({0: "b", 1: "a"}) == [(1, "a", "b", 1)]  # a draw: rank 0 is right


def test_other_versions() -> None:
    found = spoil(healthy(6), 2, versions={**VERSIONS, "torch": "2.12.0"})
    found = spoil(found, 3, versions={**VERSIONS, "torch": "2.12.0"})
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((2, 3), True)
    assert where(problem.ranks, found.seats) == "gpu01"
    assert (problem.found, problem.wanted) == ("torch 2.12.0", "2.13.0 as on 4 of 6")
    assert "PYTHON" in problem.mend


def test_a_package_that_only_some_have() -> None:
    found = spoil(healthy(), 1, versions={**VERSIONS, "transformer-engine": "2.4"})
    problem = only(found)
    assert problem.found == "transformer-engine 2.4"
    assert problem.wanted == "none as on 3 of 4"


def test_other_sources_of_this_project() -> None:
    problem = only(spoil(healthy(), 3, versions={**VERSIONS, "megatron_prime": "0.1 xyz"}))
    assert problem.found == "megatron_prime 0.1 xyz"
    assert "checkout" in problem.mend


def test_another_sglang_and_another_driver() -> None:
    assert only(spoil(healthy(), 2, sglang="0.5.16")).found == "sglang 0.5.16"
    driver = replace(facts(2).driver or Driver(), version="560.9")
    problem = only(spoil(healthy(), 2, driver=driver))
    assert (problem.found, problem.refuses) == ("GPU driver 560.9", False)


def test_a_model_that_is_not_there_or_another() -> None:
    gone = {**(facts(2).sources or {}), "model.hf": Source("/m", "00", "nothing is there")}
    problem = only(spoil(healthy(), 2, sources=gone))
    assert problem.found == "model.hf = /m: nothing is there"
    assert problem.refuses
    other = {**(facts(2).sources or {}), "data.train": Source("/t", "33cc")}
    problem = only(spoil(healthy(), 2, sources=other))
    assert problem.ranks == (2, 3)
    assert problem.found == "data.train of content 33cc"
    assert problem.wanted == "22bb as on 1 of 2"


def test_another_gpu_and_none() -> None:
    other = Gpu("A100", "GPU-3", 80 * GIB, 79 * GIB, 2)
    assert only(spoil(healthy(), 3, gpu=other)).found == "GPU A100, 80 GiB"
    found = [one.found for one in problems_of(spoil(healthy(), 3, gpu=None))]
    assert found == ["GPU none", "a GPU's device file, but torch finds no GPU"]


def test_no_gpu_anywhere_is_a_cpu() -> None:
    found = healthy()
    for rank in found.facts:
        spoil(found, rank, gpu=None, has_gpu_device=False)
    assert problems_of(found) == []
    for rank in found.facts:
        spoil(found, rank, has_gpu_device=True)
    problem = only(found)
    assert problem.ranks == (0, 1, 2, 3)
    assert "CUDA_VISIBLE_DEVICES" in problem.mend


def test_servers_of_several_gpus_must_see_them() -> None:
    found = healthy()
    found.needs = replace(NEEDS, gpus_seen=2)
    for rank in (0, 1):
        spoil(found, rank, gpu=Gpu("H100", f"GPU-{rank}", 80 * GIB, 79 * GIB, 1))
    problem = only(found)
    assert (problem.ranks, problem.found) == ((0, 1), "1 visible GPUs")
    assert "--gpus-per-task" in problem.mend


def test_a_gpu_that_somebody_uses_is_named_with_who() -> None:
    found = spoil(healthy(), 3, gpu=Gpu("H100", "GPU-3", 80 * GIB, 50 * GIB, 2))
    tenants = (
        Tenant("GPU-3", 77, "/usr/bin/python", 29 * GIB),
        Tenant("GPU-3", 1003, "python", GIB),  # this rank itself
        Tenant("GPU-2", 78, "python", GIB),  # on another one
    )
    spoil(found, 2, driver=replace(facts(2).driver or Driver(), tenants=tenants))
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((3,), True)
    assert problem.found == (
        "50.0 of 80.0 GiB free on its GPU, beside pid 77 /usr/bin/python 29.0 GiB"
    )
    assert problem.wanted.startswith("60.0 GiB")
    assert "memory.device_gib" in problem.mend


def test_a_gpu_that_somebody_uses_a_little_is_a_warning() -> None:
    found = spoil(healthy(), 3, gpu=Gpu("H100", "GPU-3", 80 * GIB, 76 * GIB, 2))
    assert not only(found).refuses
    clean = Gpu("H100", "GPU-3", 80 * GIB, 78 * GIB + 1, 2)
    assert problems_of(spoil(healthy(), 3, gpu=clean)) == []


def test_computing_mode_and_ecc_errors() -> None:
    alone = (Card("GPU-2", "Exclusive_Process", 0), Card("GPU-3", "Default", None))
    found = spoil(healthy(), 2, driver=Driver("570.1", alone, ()))
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((2, 3), True)
    assert "Exclusive_Process" in problem.found
    found.needs = replace(NEEDS, shares_gpus=False)  # one process on each
    assert problems_of(found) == []
    wrong = (Card("GPU-2", "Default", 3), Card("GPU-9", "Default", 5))  # 9: not of this run
    problem = only(spoil(healthy(), 2, driver=Driver("570.1", wrong, ())))
    assert problem.found.startswith("3 uncorrected ECC errors")
    assert not problem.refuses


def test_host_memory() -> None:
    problem = only(spoil(healthy(), 2, memory=Memory(90 * GIB, 80 * GIB, GIB)))
    assert (problem.ranks, problem.refuses) == ((2, 3), True)
    assert problem.found == "80.0 of 90.0 GiB of host memory free"
    assert problem.wanted.startswith("100.0 GiB")
    # enough in all, but taken now: somebody else's pages, or a file cache that yields
    problem = only(spoil(healthy(), 2, memory=Memory(200 * GIB, 80 * GIB, GIB)))
    assert not problem.refuses


def test_shared_memory() -> None:
    problem = only(spoil(healthy(), 2, memory=Memory(900 * GIB, 800 * GIB, 64 * 2**20)))
    assert problem.found == "0.06 GiB free in /dev/shm"
    assert "--shm-size" in problem.mend


@pytest.mark.parametrize(
    ("free", "keeps_all", "refuses"),
    [(614, False, True), (615, False, None), (214, True, True), (216, True, False)],
)
def test_disk(free: int, keeps_all: bool, refuses: bool | None) -> None:
    """3 checkpoints of 200 GiB and a model of 15."""
    found = healthy(2)
    found.needs = replace(NEEDS, keeps_all=keeps_all)
    spoil(found, 0, disk=Disk(free * GIB, 9000 * GIB))
    if refuses is None:
        assert problems_of(found) == []
        return
    problem = only(found)
    assert problem.refuses is refuses
    assert problem.found == f"{free}.0 GiB free below run.folder"
    assert problem.wanted.startswith("615.0 GiB: 3 checkpoints of 200.0")
    assert "checkpoint.keep" in problem.mend


def test_ulimits_are_warnings() -> None:
    problem = only(spoil(healthy(), 1, limits=Limits(1024, None, True)))
    assert (problem.found, problem.refuses) == ("at most 1024 open files (ulimit -n)", False)
    problem = only(spoil(healthy(), 1, limits=Limits(None, 8 * 2**20, True)))
    assert "locked memory" in problem.found
    assert problems_of(spoil(healthy(), 1, limits=Limits(None, 8 * 2**20, False))) == []
    assert problems_of(spoil(healthy(2), 1, limits=Limits(None, 8 * 2**20, True))) == []


def test_probes_without_an_answer() -> None:
    found = spoil(healthy(), 2, sources=None, silent=("sources",))
    assert only(found).found == "no answer about model and data"
    assert only(found).ranks == (2, 3)  # it was asked for its node
    found = spoil(healthy(), 2, limits=None, silent=("limits",))
    assert (only(found).found, only(found).ranks) == ("no answer about ulimits", (2,))
    found = spoil(healthy(), 2, sglang=None, failed={"sglang": "RuntimeError: no SGLang"})
    assert (only(found).found, only(found).refuses) == ("RuntimeError: no SGLang", True)
    found = spoil(healthy(), 2, driver=None, failed={"driver": "RuntimeError: no nvidia-smi"})
    assert not only(found).refuses


def test_another_view_of_the_configuration() -> None:
    problem = only(spoil(healthy(), 3, config_problem="data.train: no file /t\nmodel.hf: none"))
    assert (problem.ranks, problem.found) == ((3,), "data.train: no file /t; model.hf: none")


def test_a_run_without_a_plan_is_told_what_is_not_checked() -> None:
    found = healthy()
    found.needs = replace(NEEDS, device=None, host=None, checkpoint=None, no_plan="uneven stages")
    spoil(found, 0, disk=Disk(1, 1))
    assert (only(found).found, only(found).refuses) == ("no plan: uneven stages", False)


def test_ports() -> None:
    problem = only(spoil(healthy(), 2, ports="after 3 of 8 free ports of 127.0.0.1: denied"))
    assert problem.ranks == (2, 3)
    found = healthy()
    found.hub = {2: "no way to port 5 of gpu00, rank 0's node: timed out"}
    assert "firewall" in only(found).mend


@pytest.mark.parametrize(("said", "part"), [("is another folder", "another"), (None, "no answer")])
def test_a_folder_that_is_not_shared(said: str | None, part: str) -> None:
    found = healthy()
    found.shared = {0: "", 2: said}
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((2, 3), True)
    assert part in problem.found
    assert "run.folder" in problem.mend


@pytest.mark.parametrize(
    ("offset", "error", "refuses"),
    [
        *[(0.9, 0.0, None), (1.4, 0.5, None), (1.6, 0.5, False), (-1.6, 0.5, False)],
        *[(60.4, 0.5, False), (61.0, 0.5, True), (-3600.0, 0.5, True)],
    ],
)
def test_clocks(offset: float, error: float, refuses: bool | None) -> None:
    found = healthy()
    found.clocks = {2: Clock(offset, error)}
    if refuses is None:
        assert problems_of(found) == []
        return
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((2, 3), refuses)
    side = "ahead of" if offset > 0 else "behind"
    assert problem.found.startswith(f"a clock {abs(offset):.1f} s {side} rank 0's")


def hang(found: Findings, at: dict[int, int]) -> Findings:
    """Ranks that did not come to the end, and where they are."""
    found.reduced = {rank: one for rank, one in found.reduced.items() if rank not in at}
    found.at = {**found.at, **at}
    return found


def test_who_never_began_holds_up_the_others() -> None:
    """Stages: gloo 0 and 1, node 2 and 3, all 4 and 5."""
    found = hang(healthy(), {0: 4, 1: 4, 2: 2, 3: 1})
    problem = only(found)
    assert problem.ranks == (3,)
    assert problem.found == (
        "did not begin the all-reduce inside the node within 15 s; 3 others wait for it"
    )


def test_a_node_whose_all_reduce_hangs() -> None:
    found = hang(healthy(), {0: 4, 1: 4, 2: 2, 3: 2})
    problem = only(found)
    assert where(problem.ranks, found.seats) == "gpu01"
    assert (
        problem.found
        == "did not end the all-reduce inside the node within 15 s; 2 others wait for it"
    )


def test_a_network_that_hangs_is_nobodys_fault() -> None:
    found = hang(healthy(), dict.fromkeys(range(4), 4))
    problem = only(found)
    assert problem.ranks == (0, 1, 2, 3)
    assert problem.found == "did not end the all-reduce of all ranks within 15 s"
    assert "NCCL_SOCKET_IFNAME" in problem.mend


def test_a_rank_that_says_nothing_of_all_reduces() -> None:
    found = hang(healthy(), {0: 0, 1: 0, 2: 0, 3: -1})
    assert only(found).ranks == (3,)


def test_an_all_reduce_that_fails_is_told_alone() -> None:
    found = hang(healthy(), {0: 2, 1: 2})
    found.reduced = {**found.reduced, 2: Reduced((), "RuntimeError: no NVLink")}
    found.at = {**found.at, 2: 2}
    problem = only(found)
    assert (problem.ranks, problem.found) == ((2,), "RuntimeError: no NVLink")
    assert "inside the node" in problem.wanted


def test_a_wrong_sum() -> None:
    found = healthy()
    wrong = tuple(replace(one, is_right=one.stage != ALL) for one in timings(found, 3))
    found.reduced = {**found.reduced, 3: Reduced(wrong)}
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((3,), True)
    assert problem.found == "a wrong sum of the all-reduce of all ranks"


def slow_where(found: Findings, stage: str, ranks: set[int], seconds: float) -> None:
    """Groups of a stage with one of `ranks` in them take so long."""
    found.reduced = {
        rank: Reduced(
            tuple(
                replace(t, seconds=seconds) if t.stage == stage and ranks & set(t.ranks) else t
                for t in one.timings
            )
        )
        for rank, one in found.reduced.items()
    }


def test_a_slow_node() -> None:
    found = healthy(8)
    slow_where(found, NODE, {4, 5}, 0.025)
    problem = only(found)
    assert (problem.ranks, problem.refuses) == ((4, 5), False)
    assert problem.found == "25.0 ms for the all-reduce inside the node"
    assert problem.wanted.startswith("10.0 ms")


def test_a_slow_network_card_is_in_two_slow_pairs() -> None:
    found = healthy(12)
    slow_where(found, PAIRS, {4, 5}, 0.03)
    assert only(found).ranks == (4, 5)


def test_a_slow_link_is_one_pair() -> None:
    found = healthy(12)
    found.reduced = {
        rank: Reduced(
            tuple(replace(t, seconds=0.03) if t.ranks == (4, 5, 6, 7) else t for t in one.timings)
        )
        for rank, one in found.reduced.items()
    }
    assert only(found).ranks == (4, 5, 6, 7)


def test_slow_is_twice_the_median_and_not_a_trifle() -> None:
    def timed(*seconds: float) -> list[Timing]:
        return [Timing(NODE, (i,), 1, s, True) for i, s in enumerate(seconds)]

    assert slow_ones(timed(1.0)) == []
    assert slow_ones(timed(1.0, 1.9)) == []
    assert [one.ranks for one in slow_ones(timed(1.0, 2.1))] == [(1,)]
    assert [one.ranks for one in slow_ones(timed(3.0, 1.0, 1.0))] == [(0,)]
    assert slow_ones(timed(1e-4, 4e-3)) == []


def test_the_same_problem_is_told_once_and_refusals_first() -> None:
    found = healthy()
    for rank in found.facts:
        spoil(found, rank, limits=Limits(100, None, False))
    found.clocks = {2: Clock(100.0, 0.0)}
    problems = problems_of(found)
    assert [(one.refuses, one.ranks) for one in problems] == [(True, (2, 3)), (False, (0, 1, 2, 3))]
    assert where(problems[1].ranks, found.seats) == "all 2 nodes"
