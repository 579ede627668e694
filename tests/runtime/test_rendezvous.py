"""Who says how many processes there are. Groups and gathering: tests/distributed."""

from __future__ import annotations

import pytest

from megatron_prime.config import ConfigError, ParallelSizes
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import Rendezvous, rendezvous_from  # noqa: E402

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "4321",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04,9]",
    "SLURM_NTASKS": "8",
}


def test_alone() -> None:
    assert rendezvous_from({}) == Rendezvous(rank=0, world_size=1, local_rank=0)


def test_torchrun_comes_before_slurm() -> None:
    assert rendezvous_from({**SRUN, **TORCHRUN}) == Rendezvous(3, 8, 1, "node7", 4321)


def test_srun() -> None:
    assert rendezvous_from(SRUN) == Rendezvous(5, 8, 1, "gpu03", 20_000)
    job = {**SRUN, "SLURM_JOB_ID": "123456"}
    assert rendezvous_from(job).master_port == 23_456, "two jobs on a node must not collide"
    named = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}
    assert rendezvous_from(named) == Rendezvous(5, 8, 1, "10.0.0.1", 7)


def test_the_body_of_an_sbatch_script_is_one_process() -> None:
    body = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert rendezvous_from(body).world_size == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("login1", "login1"),
        ("n1,n2", "n1"),
        ("gpu[003,007-009],big1", "gpu003"),
        ("rack[2-3]-node,x", "rack2-node"),
    ],
)
def test_first_host_of_a_node_list(hosts: str, first: str) -> None:
    assert rendezvous_from({**SRUN, "SLURM_STEP_NODELIST": hosts}).master_addr == first


def test_half_of_torchruns_variables() -> None:
    with pytest.raises(ConfigError, match="but not MASTER_ADDR, MASTER_PORT"):
        rendezvous_from({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (2, 3), (8, 1), (0, 1)])
def test_layout_that_does_not_fit_is_refused_before_any_group(tp: int, pp: int) -> None:
    with pytest.raises(ConfigError, match=f"found 4 processes, wanted a multiple .* = {tp} . {pp}"):
        distributed.initialize(Rendezvous(world_size=4), ParallelSizes(tp, pp), seed=0, timeout_s=5)
    assert not distributed.dist.is_initialized()


def test_alone_from_start_to_end_and_again() -> None:
    for _ in range(2):
        distributed.initialize(Rendezvous(), ParallelSizes(), seed=0, timeout_s=5)
        ranks = distributed.WorldRanks(5)
        assert (ranks.rank, ranks.world_size, ranks.device.type) == (0, 1, "cpu")
        assert ranks.gather([], []) == []
        distributed.destroy()
    distributed.destroy()
