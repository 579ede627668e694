"""What this rank can find out by itself: a function per field of `Facts`.

Each runs in a thread of its own, for any of them may hang: on a file system whose server is gone,
on a driver that does not answer. What is not there in time is reported as silent.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

import megatron_prime
from megatron_prime.config import RunConfig
from megatron_prime.config_file import describe
from megatron_prime.preflight import nvidia
from megatron_prime.preflight.children import output_of
from megatron_prime.preflight.facts import (
    DIRTY_BYTES,
    Disk,
    Facts,
    Gpu,
    Limits,
    Memory,
    Seat,
    Source,
)
from megatron_prime.runtime.host_memory import host_bytes
from megatron_prime.runtime.provenance import installed

PACKAGES = ("transformers", "transformer-engine", "megatron-core", "numpy")
MODEL_FILES = (".safetensors", ".distcp", ".json", ".model", ".jinja", ".tiktoken", ".py")
TOKENIZER_FILES = ("merges.txt", "vocab.txt")
FREES_S, AGAIN_S = 10.0, 0.5
LOOPBACK = "127.0.0.1"
EDGE = 64 * 2**10  # bytes at a file's start and end that make its digest, with its size

Probe = Callable[[], Any]


class Probes:
    """Probes that have been started, and what they have found so far."""

    def __init__(self, seat: Seat, config_problem: str, probes: Mapping[str, Probe]) -> None:
        """Start them all; `probes` by their fields of `Facts`."""
        self.seat, self.config_problem = seat, config_problem
        self._found: dict[str, Any] = {}
        self._failed: dict[str, str] = {}
        self._threads = {
            name: threading.Thread(target=self._ask, args=(name, probe), name=name, daemon=True)
            for name, probe in probes.items()
        }
        for thread in self._threads.values():
            thread.start()

    def facts(self, until: float) -> Facts:
        """Wait for the answers, at most `until`."""
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))
        found, failed = dict(self._found), dict(self._failed)
        silent = tuple(name for name in self._threads if name not in found | failed)
        return Facts(self.seat, self.config_problem, **found, silent=silent, failed=failed)

    def _ask(self, name: str, probe: Probe) -> None:
        try:
            self._found[name] = probe()
        except Exception as error:  # whatever it is: somebody has to know about it
            self._failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]


def probes_of(
    config: RunConfig,
    seat: Seat,
    local_ranks: int,
    asks_for_gpus: bool = True,
    until: float = 0.0,
) -> dict[str, Probe]:
    """What a rank asks of itself, and, when it leads, of its node. GPUs may get free `until`."""
    own: dict[str, Probe] = {
        "versions": lambda: versions(config),
        "gpu": lambda: gpu(seat.local_rank, until),
        "has_gpu_device": lambda: Path("/dev/nvidiactl").exists(),
        "asks_for_gpus": lambda: asks_for_gpus,
        "limits": limits,
    }
    if not seat.leads:
        return own
    with_sglang = config.rollout.engine == "sglang" and config.debug.rollouts_from is None
    servers = local_ranks // config.rollout.tensor_parallel_size if with_sglang else 0
    of_node: dict[str, Probe] = {
        "driver": nvidia.driver,
        "memory": memory,
        "disk": lambda: disk(config.run.folder),
        "ports": lambda: ports(2 * max(1, servers)),
        "sources": lambda: sources(config),
    }
    if with_sglang:
        of_node["sglang"] = lambda: sglang(config.rollout.sglang_python or Path(sys.executable))
    return own | of_node


def versions(config: RunConfig) -> dict[str, str]:
    """By name: what has to be the same on all ranks. Digests are of the code and of the knobs."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    found |= {name: version for name in PACKAGES if (version := installed(name))}
    found["megatron_prime"] = f"{megatron_prime.__version__} {code_digest()}"
    found["configuration"] = _short(hashlib.sha256(describe(config).encode()))
    return found


def code_digest() -> str:
    """Of this project's sources, as they lie there; two checkouts of one version may differ."""
    digest = hashlib.sha256()
    package = Path(megatron_prime.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return _short(digest)


def gpu(local_rank: int, until: float = 0.0) -> Gpu | None:
    """The rank's device, chosen as `train` does; None where torch finds none.

    What a job leaves may take seconds to go: while much is taken, memory is read again, for
    `FREES_S` and not beyond `until`.
    """
    if not torch.cuda.is_available():
        return None
    visible = torch.cuda.device_count()
    index = local_rank % visible
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    until = min(until, time.monotonic() + FREES_S)
    while total - free > DIRTY_BYTES and time.monotonic() < until:
        time.sleep(AGAIN_S)
        free, total = torch.cuda.mem_get_info(index)
    uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else ""  # older torch: unknown
    return Gpu(properties.name, uuid, total, free, visible)


def limits() -> Limits:
    """The soft ulimits: what a process gets without asking for more."""

    def soft(kind: int) -> int | None:
        found = resource.getrlimit(kind)[0]
        return None if found == resource.RLIM_INFINITY else found

    infiniband = Path("/sys/class/infiniband")
    return Limits(
        soft(resource.RLIMIT_NOFILE),
        soft(resource.RLIMIT_MEMLOCK),
        infiniband.is_dir() and any(infiniband.iterdir()),
    )


def memory() -> Memory:
    """Of the host, and of its shared memory."""
    found, total = psutil.virtual_memory(), host_bytes()
    shm = Path("/dev/shm")
    shm_free = disk(shm).free if shm.is_dir() else None
    return Memory(total, min(total, found.available), shm_free)


def disk(folder: Path) -> Disk:
    """Of the file system that `folder` is on, or would be; quotas are not seen."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    found = shutil.disk_usage(there)
    return Disk(found.free, found.total)


def ports(number: int) -> str:
    """Whether servers could listen on so many ports of loopback, and be reached."""
    held = list[socket.socket]()
    try:
        for _ in range(number):
            listener = socket.create_server((LOOPBACK, 0))
            held.append(listener)
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        return f"after {len(held)} of {number} free ports of {LOOPBACK}: {error}"
    finally:
        for listener in held:
            listener.close()
    return ""


def sources(config: RunConfig) -> dict[str, Source]:
    """Of model and data, by their knobs."""
    weights = config.model.weights
    if weights is not None and (weights / "policy").is_dir():  # of a run's checkpoint
        weights /= "policy"
    given = {
        "model.hf": config.model.hf,
        "model.weights": weights,
        "prm.hf": config.prm.hf,
        "critic.hf": config.critic.hf,
        "data.train": config.data.train,
        "data.eval": config.data.eval,
    }
    return {knob: source(path) for knob, path in given.items() if path is not None}


def source(path: Path) -> Source:
    """Size, start and end of a file or of all files of a model's folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(filter(matters, path.glob("*")))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(EDGE))
            opened.seek(max(0, size - EDGE))
            digest.update(opened.read())
    problem = "" if files else "nothing is there"
    if path.is_dir():
        problem = problem or missing_weights(path)
    return Source(str(path), _short(digest), problem)


def matters(file: Path) -> bool:
    """Of a model's folder: weights, configuration, tokenizer; not what tools and NFS leave."""
    name = file.name
    return (
        not name.startswith(".")
        and (file.suffix in MODEL_FILES or name in TOKENIZER_FILES)
        and file.is_file()
    )


def missing_weights(folder: Path) -> str:
    """Which of a model's files are not there; nothing: all are."""
    if any(folder.glob("*.distcp")):
        return "" if (folder / ".metadata").is_file() else "no .metadata beside its *.distcp"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in wanted if not (folder / name).is_file())
        return f"{', '.join(missing[:3])} of its index: not there" if missing else ""
    return "" if any(folder.glob("*.safetensors")) else "no *.safetensors"


def sglang(python: Path) -> str:
    """The version that the servers' interpreter has; raises if it has none."""
    program = "from importlib.metadata import version; print(version('sglang'))"
    return output_of([str(python), "-P", "-c", program]).strip()


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:8])
