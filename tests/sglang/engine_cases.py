"""What each rank of test_weights.py does: trains a tiny model beside real SGLang servers.

`torchrun --nproc-per-node=N engine_cases.py FOLDER LAYOUT TP FATE NAME…`: for each checkpoint of
FOLDER, the engine in servers of TP ranks; log-probs of fixed sequences, by the servers, by the
trainer, and by `transformers` as `tiny_models.py` wrote them. FATE `killed`: server 0 is killed in
the middle of a sync.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from layouts import LAYOUTS, megatron_options  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_prime.config import ParallelSizes, RunConfig  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Forward  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.rollout.sglang_engine import SglangEngine  # noqa: E402
from megatron_prime.rollout.sglang_setup import sglang_engine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import Prompt, Sampling, TokenSequence  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402
from megatron_prime.weights.source import LiveWeights  # noqa: E402

TIMEOUT_S = 300
STOP = 3
CLOSE = 1e-4  # between two programs that compute in fp32


class Numbers:
    """A tokenizer whose text shows the tokens."""

    eos_token_id = STOP

    def decode(self, token_ids, *, skip_special_tokens):
        return " ".join(map(str, token_ids))


def main(folder: Path, layout: str, tp: int, killed: bool, names: list[str]) -> None:
    sizes = LAYOUTS[layout]
    distributed.initialize(rendezvous_from(os.environ), sizes, 1, TIMEOUT_S)
    store = dist.TCPStore(
        "127.0.0.1", int(os.environ["STORE_PORT"]), is_master=dist.get_rank() == 0
    )
    for name in names:
        check(folder, name, sizes, tp, dist.PrefixStore(name, store), killed)
        if dist.get_rank() == 0:
            print(f"the servers have the trainer's weights: {name}", flush=True)
    distributed.destroy()


def check(
    folder: Path,
    name: str,
    sizes: ParallelSizes,
    tp: int,
    store: dist.Store,
    killed_in_sync: bool,
) -> None:
    """Before and after two updates; `killed_in_sync`: server 0 dies in the second one's sync."""
    config = config_of(folder, name, sizes, tp)
    shape = ModelShape.from_hf(config.model.hf, sizes.tp)
    precision = config.precision.policy
    chunks = build_model(shape, precision, config.megatron)
    load_hf(chunks, config.model.hf, shape)
    trainer = TrainableEngine(chunks, shape, config.policy, 1.0, 10, precision)
    weights = LiveWeights(chunks, shape)
    truth = torch.load(folder / f"{name}.pt", weights_only=False)
    rows = [TokenSequence(tuple(ids), prompt) for ids, prompt in truth["sequences"]]
    group = parallel_state.get_tensor_model_parallel_group()
    world_size = dist.get_world_size()
    engine = sglang_engine(config, sizes, Numbers(), torch.device("cpu"), world_size, store, group)
    try:
        engine.load_weights(weights, 0)
        first = scored(engine, rows)
        equal(first, truth["logprobs"], f"{name}: the servers and transformers")
        equal(first, trainer.logprobs(rows), f"{name}: the servers and the trainer")
        before = first
        for version in (1, 2):
            trainer.train_step(rows, range(len(rows)), loss)
            equal(scored(engine, rows), before, f"{name}: before the sync")
            if killed_in_sync and version == 2:
                kill_in_a_sync(engine)
            engine.load_weights(weights, version)
            after, wanted = scored(engine, rows), trainer.logprobs(rows)
            equal(after, wanted, f"{name}: after update {version}")
            change = float((after - before).abs().max())
            assert change > 0.01, f"{name}: the update changed no log-prob by more than {change}"
            before = after
        sampled(engine, trainer, rows)
        restarts = engine.take_metrics()["rollout/server_restarts"]
        assert restarts == killed_in_sync, f"{name}: {restarts} restarts"
    finally:
        engine.close()


def kill_in_a_sync(engine: SglangEngine) -> None:
    """Once, as soon as the second round of the next sync has been handed to server 0."""
    handover, publish = engine._sync._handover, engine._sync._handover.publish
    assert len(handover.layout.rounds) > 3, "a sync of several rounds"

    def killing(round_: int) -> None:
        publish(round_)
        if round_ == 1:
            handover.publish = publish
            if dist.get_rank() == 0:
                os.kill(engine._group._server.pid, signal.SIGKILL)

    handover.publish = killing


def config_of(folder: Path, name: str, sizes: ParallelSizes, tp: int) -> RunConfig:
    exact = {"dtype": "fp32"}
    return RunConfig.model_validate(
        {
            "run": {"folder": folder / f"run-{name}"},
            "model": {"hf": folder / name},
            "data": {"train": folder / "none"},
            "precision": {"policy": exact, "prm": exact, "reference": exact},
            "policy": {"lr": 1e-2, "mini_batch_size": 10, "micro_batch_tokens": 128},
            "rollout": {
                "engine": "sglang",
                "tensor_parallel_size": tp,
                "sglang_python": Path(os.environ["SGLANG_PYTHON"]),
                "sync_bucket_mib": 0.05,  # several rounds, also of a tiny model
            },
            "megatron": megatron_options(sizes),
        }
    )


def loss(forward: Forward) -> torch.Tensor:
    """Makes the first token of each response likelier."""
    return -forward.logprobs[:, 0].sum()


def scored(engine: SglangEngine, rows: list[TokenSequence]) -> torch.Tensor:
    """What this rank's server says of the responses, [N, T]; the same on all ranks."""
    found: list[list[float]] = []
    group = engine._group
    if group.member.leads:
        for i, row in enumerate(rows):
            body: dict[str, Any] = {
                "rid": f"row{i};",
                "input_ids": list(row.token_ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            answer = group.ask(group.client._call("POST", "/generate", body, 120.0)).result()
            logprobs = answer["meta_info"]["input_token_logprobs"]
            assert len(logprobs) == len(row.token_ids)
            found.append([logprob for logprob, _, _ in logprobs[row.prompt_length :]])
    servers = [one for one in group.gathered(found) if one]
    assert len(servers) == group.member.servers
    padded = [pad(one) for one in servers]
    for other in padded[1:]:
        equal(other, padded[0], "two servers")
    return padded[0]


def pad(rows: list[list[float]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])


def sampled(engine: SglangEngine, trainer: TrainableEngine, rows: list[TokenSequence]) -> None:
    """The log-probs of what the servers sample are the trainer's, too."""
    prompts = [Prompt(i, row.token_ids[:3], "0", "math", "t") for i, row in enumerate(rows)]
    mine = list(engine.generate(prompts, Sampling(2, 1.0, 20, seed=4)))
    everyones = [group for found in engine._group.gathered(mine) for group in found]
    groups = sorted(everyones, key=lambda group: group.prompt.prompt_id)
    assert [g.prompt.prompt_id for g in groups] == list(range(len(prompts)))
    assert {r.policy_version for g in groups for r in g.rollouts} == {2}
    pairs = [(g.prompt, r) for g in groups for r in g.rollouts]
    responses = [TokenSequence(p.token_ids + r.response_ids, len(p.token_ids)) for p, r in pairs]
    told = pad([list(r.rollout_logprobs) for _, r in pairs])
    equal(told, trainer.logprobs(responses), "sampled tokens")


def equal(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    assert found.shape == wanted.shape, where
    gap = float((found - wanted).abs().max())
    assert gap < CLOSE, f"{where}: log-probs differ by up to {gap}"


if __name__ == "__main__":
    where, how, servers_of, fate, *which = sys.argv[1:]
    main(Path(where), how, int(servers_of), fate == "killed", which)
