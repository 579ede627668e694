"""What a rank finds out by itself, against what the test put there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from made_up import seat

from megatron_prime.config import RunConfig
from megatron_prime.preflight import probes
from megatron_prime.preflight.children import output_of
from megatron_prime.preflight.facts import FACTS, SEAT, nodes_of, ranges
from megatron_prime.preflight.probes import Probes
from megatron_prime.runtime.host_memory import GROUPS, OWN, limits


def config_of(folder: Path, **tables: dict[str, object]) -> RunConfig:
    given = {"run": {"folder": folder / "run"}, "model": {"hf": folder}, "data": {"train": folder}}
    return RunConfig.model_validate({**given, **tables})


def test_answers_errors_and_silence() -> None:
    never = threading.Event()

    def fail() -> str:
        raise OSError("no such\ndevice")

    asked = Probes(seat(2), "", {"sglang": lambda: "0.5", "disk": fail, "memory": never.wait})
    began = time.monotonic()
    facts = asked.facts(began + 0.5)
    never.set()
    assert time.monotonic() - began < 5
    assert (facts.seat, facts.sglang, facts.disk) == (seat(2), "0.5", None)
    assert facts.failed == {"disk": "OSError: no such"}
    assert facts.silent == ("memory",)


def test_who_is_asked_for_a_node(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    leader, other = (set(probes.probes_of(config, seat(rank), 2)) for rank in (2, 3))
    assert other < leader
    assert leader - other == {"driver", "memory", "disk", "ports", "sources"}
    config = config_of(tmp_path, rollout={"engine": "sglang"})
    assert "sglang" in probes.probes_of(config, seat(2), 2)


def test_facts_travel_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    facts = Probes(seat(0), "wrong", probes.probes_of(config_of(tmp_path), seat(0), 2)).facts(
        time.monotonic() + 120
    )
    assert (facts.silent, facts.failed) == ((), {})
    assert FACTS.validate_json(FACTS.dump_json(facts)) == facts
    assert SEAT.validate_json(SEAT.dump_json(seat(3))) == seat(3)


def test_versions_and_knobs(tmp_path: Path) -> None:
    found = probes.versions(config_of(tmp_path))
    assert found["torch"] == torch.__version__
    assert found["megatron-core"] == metadata.version("megatron-core")
    assert ("cuda" in found) == (torch.version.cuda is not None)
    again = probes.versions(config_of(tmp_path))
    assert again == found
    other = probes.versions(config_of(tmp_path, filter={"min_accuracy": 0.1}))
    assert {name for name in found if found[name] != other[name]} == {"configuration"}


def test_one_changed_line_is_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(probes.megatron_prime.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = probes.code_digest()
    monkeypatch.setattr(probes.megatron_prime, "__file__", str(copy / "__init__.py"))
    assert probes.code_digest() == before
    (copy / "loop.py").write_text((copy / "loop.py").read_text() + "\n")
    assert probes.code_digest() != before


def test_sources_differ_by_a_byte_at_either_end_and_by_their_names(tmp_path: Path) -> None:
    body = bytes(300_000)

    def digest(name: str, content: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_bytes(content)
        return probes.source(folder).digest

    name = "model.safetensors"
    ones = [
        digest(name, body),
        digest(name, b"1" + body[1:]),
        digest(name, body[1:] + b"1"),
        digest(name, body[1:]),
        digest("other.safetensors", body),
    ]
    assert len(set(ones)) == len(ones)
    assert digest(name, body) == ones[0]


def test_a_model_of_which_a_file_is_missing(tmp_path: Path) -> None:
    assert probes.source(tmp_path / "absent").problem == "nothing is there"
    (tmp_path / "config.json").write_text("{}")
    assert probes.source(tmp_path).problem == "no *.safetensors"
    shards = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "one.safetensors").touch()
    assert probes.source(tmp_path).problem == "two.safetensors of its index: not there"
    (tmp_path / "two.safetensors").touch()
    assert probes.source(tmp_path).problem == ""
    data = tmp_path / "train.jsonl"
    data.touch()
    assert probes.source(data).problem == ""


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    found = probes.disk(tmp_path / "not" / "yet")
    assert found.total == shutil.disk_usage(tmp_path).total
    assert 0 < found.free <= found.total


def test_memory_and_limits() -> None:
    found = probes.memory()
    wanted = Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]
    assert found.total == min([int(wanted) * 1024, *limits(OWN, GROUPS)])
    assert 0 < found.available <= found.total
    said = subprocess.run(["bash", "-c", "ulimit -n"], capture_output=True, text=True).stdout
    limit = probes.limits().open_files
    assert said.strip() == ("unlimited" if limit is None else str(limit))


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.ports(8) == ""
    listen, made = socket.create_server, list[socket.socket]()

    def scarce(*arguments: object, **keywords: object) -> socket.socket:
        if len(made) == 3:
            raise OSError("address in use")
        made.append(listen(("127.0.0.1", 0)))
        return made[-1]

    monkeypatch.setattr(socket, "create_server", scarce)
    assert probes.ports(8) == "after 3 of 8 free ports of 127.0.0.1: address in use"
    assert all(one.fileno() == -1 for one in made), "none stays open"


def test_an_interpreter_without_sglang(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 'no module' >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match=r"python ended with status 3: no module"):
        probes.sglang(tmp_path / "python")
    with pytest.raises(FileNotFoundError):
        probes.sglang(tmp_path / "absent")


def test_a_child_does_not_outlive_who_asked(tmp_path: Path) -> None:
    program = (
        "import os, threading, time\n"
        "from megatron_prime.preflight.children import output_of\n"
        "ask = lambda: output_of(['sh', '-c', 'echo $$ > pid; exec sleep 600'])\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "while not (os.path.exists('pid') and open('pid').read()): time.sleep(0.01)\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    pid = (tmp_path / "pid").read_text().strip()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "Z" or time.monotonic() < until
        if state == "Z":  # nobody here reaps what is left to init
            break
        time.sleep(0.05)
    assert output_of(["echo", "yes"]) == "yes\n"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([2, 0, 1], "0–2"), ([0, 2, 3, 7], "0, 2–3, 7")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_nodes_stand_in_the_order_of_their_ranks() -> None:
    assert nodes_of({rank: seat(rank) for rank in (3, 2, 0)}) == {"gpu00": [0], "gpu01": [2, 3]}


def test_the_age_of_a_process_counts_its_start() -> None:
    program = (
        "import time; began = time.monotonic(); time.sleep(1.5)\n"
        "from megatron_prime.runtime.exit_timer import process_age\n"
        "print(process_age(), time.monotonic() - began)\n"
    )
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    whole = time.monotonic() - began
    age, since = map(float, said.stdout.split())
    assert 1.5 < since <= age + 0.02  # clock ticks are 10 ms
    assert age <= whole + 0.02
