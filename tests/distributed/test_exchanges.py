"""Bytes that real PRIME steps hand to torch.distributed, against the formulae and the planner.

The counts come from tests/bench/weak_ranks.py. Where the planner leaves something out, it is named
and counted here: nothing else may be missing.
"""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import counted
from weak_scaling import MODEL, count, sent_by_dp

from megatron_prime.planner.exchanges import on_the_wire

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# Of torch.distributed: neither collectives nor sends, or made of those that are counted or refused.
EXCHANGE_NOTHING = {
    *("get_group_rank", "get_global_rank", "get_process_group_ranks", "get_backend_config"),
    *("get_backend", "get_rank", "get_world_size", "destroy_process_group", "shrink_group"),
    *("barrier", "monitored_barrier", "new_subgroups"),
}
ARE_COUNTED_ELSEWHERE = {
    *("irecv", "recv", "send_object_list", "recv_object_list", "broadcast_object_list"),
    *("all_gather_object", "gather_object", "scatter_object_list"),
}
TWO = ("dp", "dp.zero", "tp2", "tp2.sp", "pp2", "pp2.vpp2", "cp2", "tp2.critic", "tp2.sp.critic")
FOUR = ("tp2.pp2.sp.zero", "tp2.pp2.vpp2", "tp2.cp2.sp.zero", "tp2.pp2.sp.zero.critic")
HIDDEN, LAYERS, HEAD = (MODEL[name] for name in ("hidden_size", "num_hidden_layers", "head_dim"))
TOKENS, WANTED = 16 * 40, 16 * 32  # of an update on two ranks, in packs of four rows
UPDATES, VALUE = 2, 4  # optimizer steps; bytes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return count(tmp_path_factory.mktemp("two"), 2, TWO, "equal")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return count(tmp_path_factory.mktemp("four"), 4, FOUR)


def assert_equal(found: list[Any], layout: str) -> None:
    critic = ["update_critic"] if layout.endswith("critic") else []
    phases = ["reference", "score", "update_prm", *critic, "update_policy", "sync_weights"]
    for rank, layouts in enumerate(found):
        assert list(layouts[layout]) == phases
        for phase, both in layouts[layout].items():
            assert both["counted"] == both["formula"], f"rank {rank}, {phase}"


@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_exchange_what_the_formulae_say(two: list[Any], layout: str) -> None:
    assert_equal(two, layout)
    wanted = {"dp": "dp all_reduce", "tp2.sp": "tp reduce_scatter", "pp2": "ranks send"}
    if layout in wanted:
        assert two[0][layout]["update_policy"]["counted"][wanted[layout]] > 10_000


@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_exchange_what_the_formulae_say(four: list[Any], layout: str) -> None:
    """With rollouts of many lengths."""
    assert_equal(four, layout)


def sent(found: list[Any], rank: int, layout: str, group: str) -> tuple[float, float]:
    """By the counts of the policy's update, and by the planner."""
    both = found[rank][layout]["update_policy"]
    return on_the_wire(both["counted"], {group: 2})[group], both["planner"][group]


@pytest.mark.parametrize("layout", ["pp2", "pp2.vpp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_planner_knows_what_stages_hand_on(two: list[Any], layout: str, rank: int) -> None:
    counted, planned = sent(two, rank, layout, "ranks")
    assert counted == planned > 0


@pytest.mark.parametrize("layout", ["dp", "dp.zero"])
def test_the_planner_knows_gradients_and_weights_but_for_norms(two: list[Any], layout: str) -> None:
    counted, planned = sent(two, 0, layout, "dp")
    norms = LAYERS * (2 * HIDDEN + 2 * HEAD) + HIDDEN
    if layout == "dp.zero":  # each parameter starts at a multiple of 64 values
        norms += LAYERS * 2 * (64 - HEAD)
    # Half of each value's gradient and weight go to the other rank.
    padding = counted - planned - UPDATES * norms * 2 * VALUE / 2
    assert 0 <= padding <= (UPDATES * 128 * 2 * VALUE / 2 if layout == "dp.zero" else 0)


@pytest.mark.parametrize("layout", ["tp2", "tp2.sp"])
def test_the_planner_knows_the_layers_exchanges_of_hidden_states(
    two: list[Any], layout: str
) -> None:
    """Two all-reduces per layer, forward and backward; what it leaves out is small in a real
    model, or hidden behind products."""
    counted, planned = sent(two, 0, layout, "tp")
    hidden = TOKENS * HIDDEN * VALUE
    assert planned == 8 * LAYERS * hidden / 2
    logprobs = 2 * 4 * 4 * WANTED / 2  # a maximum and three sums, in fp32
    embedding = 2 * hidden / 2
    norms_of_heads = 2 * UPDATES * LAYERS * 2 * HEAD * 4 / 2
    if layout == "tp2":
        output = 2 * WANTED * HIDDEN * VALUE / 2
        again, norms = 0.0, 0.0
    else:
        output = 3 * hidden / 2
        again = 2 * LAYERS * hidden / 2  # inputs, for the gradients of weights
        norms = 2 * UPDATES * (2 * LAYERS + 1) * HIDDEN * 4 / 2
    left_out = embedding + output + again + norms + logprobs + norms_of_heads
    assert counted == pytest.approx(planned + left_out, rel=1e-12)


def test_each_function_of_torch_distributed_is_counted_or_refused() -> None:
    known = {name for functions in counted._OPERATIONS.values() for name in functions}
    known |= {*counted._REFUSED} | EXCHANGE_NOTHING | ARE_COUNTED_ELSEWHERE
    found = {
        name
        for name, one in vars(counted.c10d).items()
        if type(one) is types.FunctionType
        and one.__module__ == counted.c10d.__name__
        and "group" in inspect.signature(one).parameters
        and not name.startswith("_")
    }
    assert found >= {"all_reduce", "all_to_all", "reduce", "isend"}
    assert found <= known


@pytest.mark.parametrize("name", counted._REFUSED)
def test_a_collective_that_is_not_counted_stops_the_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = 2
    monkeypatch.setattr(counted.dist, "get_world_size", lambda _: ranks)

    def real(tensor: str, group: Any = None) -> str:
        return f"{name} of {tensor}"

    call = counted._refusing(name, real)
    with pytest.raises(counted.NotCounted, match=rf"torch\.distributed\.{name}, wanted one of"):
        call("a", group="two ranks")
    ranks = 1
    assert call("a", group="one rank") == f"{name} of a"


@pytest.mark.parametrize(
    ("ranks", "layout", "wanted"),
    [(2, "dp", 800), (8, "dp", 1400), (8, "tp2.pp2.cp2.sp.zero", 800), (4, "tp4.sp", 0)],
)
def test_bytes_that_data_parallel_ranks_send_in_a_ring(
    ranks: int, layout: str, wanted: float
) -> None:
    """By hand: of 800 bytes each of g ranks sends (g - 1) / g, twice where they are all-reduced."""
    phases = {"update_prm": {"counted": {"dp all_reduce": 800, "tp all_gather": 800}}}
    assert sent_by_dp(phases, ranks, layout) == wanted
    parts = {"dp reduce_scatter": 500, "dp all_gather": 300}
    both = {"score": {"counted": {}}, "update_prm": {"counted": parts}}
    assert sent_by_dp(both, ranks, layout) == wanted / 2
