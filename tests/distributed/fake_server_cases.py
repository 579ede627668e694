"""What each of two ranks of test_engine_ranks.py does: the SGLang engine on fake servers."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[1] / "rollout")]

from fake_engine import PROMPTS, SAMPLING, Setting, asked, check_groups, children  # noqa: E402
from fake_sglang import asked as asked_samples  # noqa: E402

from megatron_prime.rollout.sglang_engine import SglangEngine  # noqa: E402
from megatron_prime.types import Group  # noqa: E402

ONCE = {prompt.prompt_id: 1 for prompt in PROMPTS}


def gathered(groups: list[Group]) -> list[list[Group]]:
    found: list[list[Group]] = [[], []]
    dist.all_gather_object(found, groups)
    return found


def everyones_requests(setting: Setting) -> dict[int, int]:
    found: dict[int, int] = {}
    for server in range(2 // setting.tp):
        for number, times in asked(setting.server_folder(server)).items():
            found[number] = found.get(number, 0) + times
    return found


def two_servers(folder: Path, store: dist.Store) -> None:
    """They share the prompts; one dies, the other goes on."""
    setting = Setting(folder, groups_in_flight=2)
    faults = {"die_after": 2, "starts": 1} if dist.get_rank() == 1 else {}
    engine = setting.engine(store, token_s=0.05, **faults)
    setting.load(engine, 1)
    first = pid_of(engine)
    per_rank = gathered(list(engine.generate(PROMPTS, SAMPLING)))
    check_groups([group for part in per_rank for group in part], setting.digest(1), 1)
    assert all(per_rank), "each server has answered some"
    assert (pid_of(engine) != first) == (dist.get_rank() == 1)
    times = everyones_requests(setting)
    assert times.keys() == ONCE.keys()
    assert 1 <= sum(times.values()) - len(PROMPTS) <= 2, "only what was in flight, again"
    metrics = engine.take_metrics()
    assert metrics == {
        "rollout/server_restarts": 1,
        "rollout/repeated_syncs": 0,
        "rollout/continued_tokens": 0,
    }
    lone_sync(setting, engine)
    engine.close()


def lone_sync(setting: Setting, engine: SglangEngine) -> None:
    """Server 0 dies between steps: it alone is restarted, and its sync alone done again."""
    first = pid_of(engine)
    if dist.get_rank() == 0:
        os.kill(first, signal.SIGKILL)
    setting.load(engine, 2)
    per_rank = gathered(list(engine.generate(PROMPTS, SAMPLING)))
    check_groups([group for part in per_rank for group in part], setting.digest(2), 2)
    assert (pid_of(engine) != first) == (dist.get_rank() == 0)
    metrics = engine.take_metrics()
    assert metrics["rollout/server_restarts"] == metrics["rollout/repeated_syncs"] == 1


def one_server_of_two(folder: Path, store: dist.Store) -> None:
    """Rank 0 leads, rank 1 hands over its half of the weights; the server dies in a sync."""
    setting = Setting(folder, tp=2)
    engine = setting.engine(store, die_in_update=2, starts=1)
    for version in (1, 2):
        setting.load(engine, version)
        mine = list(engine.generate(PROMPTS, SAMPLING))
        assert bool(mine) == (dist.get_rank() == 0)
        per_rank = gathered(mine)
        check_groups(per_rank[0], setting.digest(version), version)
    assert asked(setting.server_folder(0)) == {number: 2 for number in ONCE}
    assert {line["version"] for line in asked_samples(setting.server_folder(0))} == {"1", "2"}
    assert engine.take_metrics()["rollout/server_restarts"] == 1
    engine.close()


def one_rank_hangs(folder: Path, store: dist.Store) -> None:
    """Only rank 1's process hangs in a sync; the leader, whose own is well, learns of it."""
    setting = Setting(folder, tp=2, sync_timeout_s=3.0)
    engine = setting.engine(store, hang_in_update=2, starts=1)
    setting.load(engine, 1)
    first, started = pid_of(engine), time.monotonic()
    setting.load(engine, 2)
    assert time.monotonic() - started < 60, "it waited for a call that never returns"
    assert (pid_of(engine) != first) == (dist.get_rank() == 0)
    per_rank = gathered(list(engine.generate(PROMPTS, SAMPLING)))
    check_groups(per_rank[0], setting.digest(2), 2)
    assert engine.take_metrics()["rollout/server_restarts"] == 1
    engine.close()


def pid_of(engine: SglangEngine) -> int | None:
    return engine._group._server.pid


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    shared = dist.TCPStore("127.0.0.1", int(sys.argv[3]), is_master=dist.get_rank() == 0)
    cases = {"two": two_servers, "one": one_server_of_two, "hang": one_rank_hangs}
    cases[sys.argv[1]](Path(sys.argv[2]), shared)
    assert not children()
    dist.destroy_process_group()
