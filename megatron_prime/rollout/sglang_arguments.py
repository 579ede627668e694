"""What one SGLang server is started with: its options, and the environment of its process.

Three layers, the later one wins: our defaults; the user's `[sglang]` table, under SGLang's own
names; and what is ours alone, because the engine could not work otherwise. The server starts with
dummy weights, for the policy's are handed in by the first sync, and without a tokenizer, for
token ids go in and out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import megatron_prime
from megatron_prime.config import ConfigError
from megatron_prime.rollout_rules import REFUSED

PACKAGE = Path(megatron_prime.__file__).parent
CPU_FOLDER = Path(__file__).parent / "sglang_cpu"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Set by the trainer's launcher about the trainer's ranks; torch would mistake them for the server's
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TRAINERS_OWN = ("CUDA_DEVICE_MAX_CONNECTIONS",)  # Megatron wants 1, which slows inference
# With expandable segments SGLang's memory saver refuses to start, and CUDA IPC may fail.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
LAUNCHER_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
DEFAULTS: dict[str, Any] = {
    "skip_server_warmup": True,  # the first requests would be answered from dummy weights
    "sleep_on_idle": True,  # or its processes would take cores from the trainer while it trains
    "log_level": "info",
}
GPU_DEFAULTS: dict[str, Any] = {
    "mem_fraction_static": 0.4,  # weights and cache; the trainer lives on the device, too
}
CPU_DEFAULTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "disable_overlap_schedule": True,
    "enable_deterministic_inference": True,  # a request's own seed; `sglang_cpu_plugin.py`
    "max_total_tokens": 16384,  # tokens of key/value cache: SGLang would take most of the memory
    "max_running_requests": 64,
}


class Share(NamedTuple):
    """What servers may take of devices that they share with a trainer."""

    gives_memory: bool = False  # it can be released while they are not needed
    kv_tokens: int | None = None  # of key/value cache, by plan; `[sglang]` goes before it


@dataclass(frozen=True)
class ServerSpec:
    """One server: which model it serves on which devices, and how it is spoken to."""

    python: Path  # interpreter that has SGLang
    model_dir: Path  # config.json is read, weights are not
    tp: int
    devices: tuple[str, ...] | None  # as in CUDA_VISIBLE_DEVICES; None: on the CPU
    host: str  # address to listen on
    api_key: str = field(repr=False)
    dtype: Literal["fp32", "bf16", "fp16"]
    folder: Path  # of its log and its state file; one per server
    options: Mapping[str, Any] = field(default_factory=dict)  # the user's `[sglang]`
    start_timeout_s: float = 900.0
    weight_loader: str | None = None  # import path of a `--custom-weight-loader`
    gives_memory: bool = False  # its device memory can be released while it is not needed

    def __post_init__(self) -> None:
        """Refuse what would make a server that the engine can't work with."""
        if taken := sorted(set(self.options) & set(REFUSED)):
            raise ConfigError(
                f"[sglang] {taken[0]} is not for the user to set; {REFUSED[taken[0]]} decides on it"
            )
        if self.devices is not None and len(self.devices) != self.tp:
            raise ConfigError(
                f"found {len(self.devices)} devices for a server of {self.tp} ranks, wanted as "
                "many; see rollout.tensor_parallel_size"
            )


def server_arguments(spec: ServerSpec, port: int, nccl_port: int) -> dict[str, Any]:
    """Values for SGLang's `ServerArgs` by its own names."""
    owned: dict[str, Any] = {
        "model_path": str(spec.model_dir),
        "tp_size": spec.tp,
        "dtype": DTYPES[spec.dtype],
        "device": "cpu" if spec.devices is None else "cuda",
        "host": spec.host,
        "port": port,
        "nccl_port": nccl_port,
        "api_key": spec.api_key,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_memory_saver": spec.gives_memory and spec.devices is not None,  # wants libcuda
    }
    if spec.weight_loader is not None:
        owned["custom_weight_loader"] = [spec.weight_loader]
    defaults = DEFAULTS | (CPU_DEFAULTS if spec.devices is None else GPU_DEFAULTS)
    return defaults | dict(spec.options) | owned


def import_folder(spec: ServerSpec) -> Path:
    """Where the server imports our package from: a folder with a link to it, and nothing else.

    Beside the package itself there may be the trainer's whole environment, with another torch.
    """
    return spec.folder / "import"


def server_environment(
    spec: ServerSpec, environ: Mapping[str, str], cores: Sequence[int]
) -> dict[str, str]:
    """The trainer's environment with what the server needs; `cores` are those it may run on.

    What is set already stays, but for the launcher's variables and those that say which devices.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name not in (*LAUNCHER_VARIABLES, *TRAINERS_OWN)
        and not (spec.gives_memory and name in ALLOCATOR_VARIABLES)
        and not name.startswith(LAUNCHER_PREFIXES)
    }
    path = [str(import_folder(spec))]
    settings = {
        # /health answers at once whether the server is up; /health_generate asks the scheduler
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # a server that has lost a scheduler would wait a minute for core dumps before it ends
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
    }
    if spec.gives_memory:
        settings["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"  # or graphs would not leave
    if spec.devices is None:
        path.append(str(CPU_FOLDER))
        settings["SGLANG_USE_CPU_ENGINE"] = "1"
        settings["OMP_NUM_THREADS"] = str(max(1, len(cores) // spec.tp))
        if spec.tp > 1:
            settings["SGLANG_CPU_OMP_THREADS_BIND"] = threads_bind(cores, spec.tp)
    settings |= kept
    settings["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [kept.get("PYTHONPATH")])])
    if spec.devices is not None:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    return settings


def threads_bind(cores: Sequence[int], tp: int) -> str:
    """Cores for each rank as SGLang wants them, `0,1|2,3`; shared where there are too few."""
    per_rank = len(cores) // tp
    if per_rank == 0:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
    shares = (cores[rank * per_rank : (rank + 1) * per_rank] for rank in range(tp))
    return "|".join(",".join(map(str, share)) for share in shares)
