"""A sync through CUDA IPC: buffers of this process, parameters of another one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from megatron_prime.weights.checksum import checksum
from megatron_prime.weights.handover import Handover, HandoverLayout, Placed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROUNDS, ROWS, COLUMNS = 5, 300, 1000
LAYOUT = HandoverLayout(
    parameters={"w": [ROUNDS * ROWS, COLUMNS]},
    dtypes={"w": "bfloat16"},
    rounds=[
        [Placed("w", [[i * ROWS, (i + 1) * ROWS], [0, COLUMNS]], 16, "bfloat16")]
        for i in range(ROUNDS)
    ],
    buffer_bytes=16 + 2 * ROWS * COLUMNS,
    timeout_s=60.0,
)
ENGINE = f"""
import json, sys, torch
from megatron_prime.rollout import weight_loader
model = torch.nn.Module()
weight = torch.full(({ROUNDS * ROWS}, {COLUMNS}), 7.0, dtype=torch.bfloat16, device="cuda")
model.register_parameter("w", torch.nn.Parameter(weight, requires_grad=False))
print("ready", flush=True)
for line in sys.stdin:
    weight_loader.load(model, [(line.strip(), torch.zeros(1))])
    print(float(model.w.double().sum()), flush=True)
"""


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_loads_what_lies_in_the_buffers(engine: subprocess.Popen[str]) -> None:
    assert engine.stdin is not None
    assert engine.stdout is not None
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Handover.create(LAYOUT, device)
    generator = torch.Generator(device).manual_seed(0)
    for sync in (1, 2, 3):
        weights = torch.randn(ROUNDS, ROWS, COLUMNS, device=device, generator=generator).bfloat16()
        trainer.begin(sync)
        engine.stdin.write(json.dumps({"ticket": trainer.ticket, "sync": sync}) + "\n")
        engine.stdin.flush()
        for round_, part in enumerate(weights):
            trainer.wait_free(round_, 60, lambda: engine.poll() is None)
            trainer.buffers[round_ % 2][16:] = part.flatten().view(torch.uint8)
            trainer.publish(round_)
        found = trainer.wait_done(60, lambda: engine.poll() is None)
        assert found == [int(checksum(part)) for part in weights]
        assert float(engine.stdout.readline()) == float(weights.double().sum())


def test_the_checksum_is_the_same_on_both_devices() -> None:
    for size in ((3,), (1024, 1024), (37, 4099)):
        values = torch.randn(size).bfloat16()
        assert int(checksum(values)) == int(checksum(values.cuda()))
