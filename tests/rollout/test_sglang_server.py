"""Starting, waiting for and killing a server, with the fake in SGLang's place."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from fake_sglang import KEY, spec

from megatron_prime.config import ConfigError
from megatron_prime.rollout import sglang_server
from megatron_prime.rollout.sglang_arguments import (
    CPU_FOLDER,
    server_arguments,
    server_environment,
    threads_bind,
)
from megatron_prime.rollout.sglang_server import LeftOverServer, ServerNotStarted, SglangServer


@pytest.fixture
def server(tmp_path):
    made = SglangServer(spec(tmp_path / "engine"))
    yield made
    made.kill()


def test_it_lives_from_start_to_kill(server) -> None:
    assert not server.alive()
    server.start()
    server.ready()
    assert server.alive()
    process = psutil.Process(server.pid)
    server.kill()
    server.kill()
    assert not server.alive()
    assert not process.is_running()
    assert not server.state_file.exists()


def test_killing_reaches_what_the_server_left_behind(tmp_path) -> None:
    server = SglangServer(spec(tmp_path, orphan=True))
    server.start()
    server.ready()
    (orphan,) = psutil.Process(server.pid).children()
    os.kill(server.pid, signal.SIGKILL)
    while server.alive():
        time.sleep(0.01)
    assert not sglang_server._gone(orphan)
    server.kill()
    assert sglang_server._gone(orphan)


def test_a_proxy_is_not_asked_for_the_server(server, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.start()
    server.ready()


def test_the_server_imports_our_package_and_nothing_that_lies_beside_it(server) -> None:
    server.start()
    server.ready()  # before that it may not have an environment yet
    folders = psutil.Process(server.pid).environ()["PYTHONPATH"].split(os.pathsep)
    first = Path(folders[0])
    assert [path.name for path in first.iterdir()] == ["megatron_prime"]
    assert (first / "megatron_prime").samefile(Path(sglang_server.__file__).parents[1])


def test_it_can_be_started_again_after_it_died(server) -> None:
    server.start()
    server.ready()
    first = server.pid
    os.kill(first, signal.SIGKILL)
    while server.alive():
        time.sleep(0.01)
    server.start()
    server.ready()
    assert server.pid != first


def test_a_failed_start_shows_the_log_without_the_key(tmp_path) -> None:
    server = SglangServer(spec(tmp_path, exit_at_start=3))
    server.start()
    with pytest.raises(ServerNotStarted, match=r"status 3(.|\n)*some error; \*\*\*"):
        server.ready()
    assert KEY in server.log_file.read_text()
    assert server.log_file.stat().st_mode & 0o777 == 0o600
    server.kill()


def test_a_slow_start_is_given_up_and_killed(tmp_path) -> None:
    server = SglangServer(spec(tmp_path, start_s=60))
    server.start()
    with pytest.raises(ServerNotStarted, match=r"not up after 0\.5 s"):
        server.ready(timeout_s=0.5)
    assert not server.alive()


def test_a_left_over_is_refused_by_name_and_never_adopted(server, monkeypatch) -> None:
    monkeypatch.setattr(sglang_server, "LEFT_OVER_GRACE_S", 0.3)
    server.start()
    other = SglangServer(server.spec)
    with pytest.raises(LeftOverServer, match=rf"process {server.pid}(.|\n)*kill -9 {server.pid}"):
        other.start()
    assert server.alive()


def test_a_left_over_that_is_dying_is_waited_for(server) -> None:
    server.start()
    state = server.state_file.read_bytes()
    with subprocess.Popen(["sleep", "0.5"]) as dying:
        started = psutil.Process(dying.pid).create_time()
        sglang_server.State(dying.pid, started, 1, socket.gethostname()).write(server.state_file)
        other = SglangServer(server.spec)
        other.start()
        assert not psutil.pid_exists(dying.pid) or dying.poll() == 0
    assert other.state_file.read_bytes() != state
    other.kill()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', None])
def test_a_state_file_of_nobody_is_no_obstacle(server, text) -> None:
    if text is None:  # somebody else has the pid by now
        sglang_server.State(os.getpid(), 1.0, 1, socket.gethostname()).write(server.state_file)
    else:
        server.state_file.write_text(text)
    server.start()
    assert server.alive()


def test_the_key_is_in_no_command_line_or_environment(server) -> None:
    server.start()
    process = psutil.Process(server.pid)
    assert KEY not in " ".join(process.cmdline())
    assert KEY not in str(process.environ())
    assert KEY not in repr(server.spec)


def test_a_held_port_is_given_to_nobody_but_to_who_knows_it() -> None:
    held = sglang_server._reserved_port("127.0.0.1")
    port = held.getsockname()[1]
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
    held.close()


def test_the_users_options_win_over_our_defaults_only(tmp_path) -> None:
    mine = {"max_total_tokens": 99, "mem_fraction_static": 0.5}
    arguments = server_arguments(spec(tmp_path, mine), 7001, 7002)
    assert arguments["max_total_tokens"] == 99
    assert arguments["mem_fraction_static"] == 0.5
    assert arguments["max_running_requests"] == 64
    assert (arguments["port"], arguments["nccl_port"]) == (7001, 7002)
    assert arguments["api_key"] == KEY
    for name in ("model_path", "tp_size", "host", "port", "api_key", "load_format"):
        with pytest.raises(ConfigError, match=rf"\[sglang\] {name} is not for the user"):
            spec(tmp_path, {name: "x"})


def test_a_gpu_server_gets_devices_and_none_of_the_cpu_settings(tmp_path) -> None:
    on_gpus = dataclasses.replace(spec(tmp_path, tp=2), devices=("3", "5"), dtype="bf16")
    arguments = server_arguments(on_gpus, 1, 2)
    assert (arguments["device"], arguments["dtype"]) == ("cuda", "bfloat16")
    assert "attention_backend" not in arguments
    environment = server_environment(on_gpus, {"CUDA_VISIBLE_DEVICES": "0"}, range(8))
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert str(CPU_FOLDER) not in environment["PYTHONPATH"]
    with pytest.raises(ConfigError, match="found 1 devices for a server of 2 ranks"):
        dataclasses.replace(on_gpus, devices=("3",))


def test_a_server_that_shares_its_devices_can_give_its_memory(tmp_path) -> None:
    on_gpus = dataclasses.replace(spec(tmp_path), devices=("0",), gives_memory=True)
    assert server_arguments(on_gpus, 1, 2)["enable_memory_saver"] is True
    segments = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment = server_environment(on_gpus, segments, [0])
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"
    alone = dataclasses.replace(on_gpus, gives_memory=False)
    assert server_arguments(alone, 1, 2)["enable_memory_saver"] is False
    assert server_environment(alone, segments, [0]).items() >= segments.items()
    on_cpu = dataclasses.replace(on_gpus, devices=None)
    assert server_arguments(on_cpu, 1, 2)["enable_memory_saver"] is False


def test_the_trainers_launcher_does_not_reach_the_server(tmp_path) -> None:
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    environ = {name: "1" for name in launcher} | {"HOME": "/h", "PYTHONPATH": "/mine"}
    found = server_environment(spec(tmp_path, tp=2), environ, range(4))
    assert not set(launcher) & set(found)
    assert found["HOME"] == "/h"
    assert found["PYTHONPATH"].split(os.pathsep)[-1] == "/mine"
    assert str(CPU_FOLDER) in found["PYTHONPATH"].split(os.pathsep)
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"


@pytest.mark.parametrize(
    ("cores", "tp", "wanted"),
    [([0, 1], 2, "0|1"), ([2, 4, 6, 8, 9], 2, "2,4|6,8"), ([0, 1], 4, "0|1|0|1"), ([5], 1, "5")],
)
def test_each_rank_has_cores_of_its_own_where_there_are_enough(cores, tp, wanted) -> None:
    assert threads_bind(cores, tp) == wanted


def test_the_folder_of_a_cpu_server_is_packaged() -> None:
    assert (Path(CPU_FOLDER) / "sgl_kernel" / "__init__.py").exists()
    assert list(CPU_FOLDER.glob("*.dist-info/entry_points.txt"))
