"""What the ranks of test_megatron.py do; prints one JSON line per case with its error or null.

`python -m torch.distributed.run --nproc-per-node=N megatron_cases.py FOLDER`, FOLDER as made by
tiny_models.make, with the cases in cases.json, N four or eight. One launch runs all of them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from layouts import LAYOUTS, OF_EIGHT, megatron_options  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from tiny_models import CONFIGS  # noqa: E402

from megatron_prime.config import FilterSection, ParallelSizes, PrecisionOptions  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Engine  # noqa: E402
from megatron_prime.models.logprobs import vocab_parallel_logprobs_and_entropy  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import Prompt, Rollout, TokenSequence, VerifiedGroup  # noqa: E402
from megatron_prime.weights.export import export_hf  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402
from megatron_prime.weights.safetensors_io import HfCheckpoint  # noqa: E402
from megatron_prime.weights.shape import padded  # noqa: E402

TIMEOUT_S = 120
EXPORTED = ("tp1-pp1", "tp2-pp2", "tp1-pp2-vpp2")


def main(folder: Path) -> None:
    layouts = LAYOUTS if int(os.environ["WORLD_SIZE"]) == 4 else OF_EIGHT
    first, *_ = layouts.values()
    distributed.initialize(rendezvous_from(os.environ), first, 1, TIMEOUT_S)
    wanted = set(json.loads((folder / "cases.json").read_text()))

    offered = []

    def case_if_wanted(name: str, run: Callable[[], None]) -> None:
        offered.append(name)
        if name in wanted:
            case(name, run)

    for size in (1, 2, 4):
        case_if_wanted(f"vocab_parallel-tp{size}", lambda size=size: vocab_parallel(size))
    case_if_wanted("gather_groups", gather_groups)
    case_if_wanted("tally", tally)
    for layout, sizes in layouts.items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(sizes, 1, TIMEOUT_S)
        for name in CONFIGS:
            tested = Tested(folder, name, layout, sizes)
            for method in tested.cases():
                case_if_wanted(f"{method.__name__}-{name}-{layout}", method)
    if dist.get_rank() == 0:
        (folder / "offered.json").write_text(json.dumps(offered))
    distributed.destroy()


def case(name: str, run: Callable[[], None]) -> None:
    """Run one case on all ranks; rank 0 prints the first rank's error, if any."""
    error = None
    try:
        run()
    except Exception:  # whatever it is, it is this case's result
        error = f"rank {dist.get_rank()}: {traceback.format_exc()}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if dist.get_rank() == 0:
        first = next((text for text in errors if text), None)
        print(json.dumps({"case": name, "error": first}), flush=True)


def vocab_parallel(tp: int) -> None:
    """Values and gradients against log_softmax of the whole; also where a rank has only padding."""
    groups = [dist.new_group(list(range(i, i + tp))) for i in range(0, 4, tp)]
    group = groups[dist.get_rank() // tp]
    for vocab, dtype, tolerance in [
        (5, torch.float32, 1e-5),
        (61, torch.float32, 1e-5),
        (64, torch.float32, 1e-5),
        (61, torch.bfloat16, 1e-2),
    ]:
        torch.manual_seed(vocab)
        whole = (torch.randn(3, 7, padded(vocab, tp)) * 9).to(dtype)
        whole[..., vocab:] = 50.0  # padding that would win if it took part
        targets = torch.randint(0, vocab, (3, 7))
        weights = torch.randn(2, 3, 7)

        mine = whole.chunk(tp, -1)[group.rank()].clone().requires_grad_()
        before = mine.detach().clone()
        logprobs, entropy = vocab_parallel_logprobs_and_entropy(mine, targets, vocab, group)
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        assert torch.equal(mine.detach(), before), "the input was overwritten"

        truth = whole.float().requires_grad_()
        logp_V = truth[..., :vocab].log_softmax(-1)
        true_logprobs = logp_V.gather(-1, targets[..., None]).squeeze(-1)
        true_entropy = -(logp_V.exp() * logp_V).sum(-1)
        (weights[0] * true_logprobs + weights[1] * true_entropy).sum().backward()
        assert_close(logprobs, true_logprobs, 1e-5)
        assert_close(entropy, true_entropy, 1e-5)
        assert truth.grad is not None
        assert mine.grad is not None
        assert_close(mine.grad.float(), truth.grad.chunk(tp, -1)[group.rank()], tolerance)


def gather_groups() -> None:
    """Every rank gets all groups in the order of the prompts; a missing one is an error."""
    rank = dist.get_rank()
    ranks = distributed.WorldRanks(TIMEOUT_S)
    prompts = [group_of(number, 0).prompt for number in (7, 3, 9, 1, 4)]
    mine = [group_of(prompt.prompt_id, rank) for prompt in prompts[rank::4]]
    found = ranks.gather(mine, prompts)
    marks = [(group.prompt.prompt_id, group.checker_failures) for group in found]
    assert marks == [(7, 0), (3, 1), (9, 2), (1, 3), (4, 0)]
    with pytest.raises(RuntimeError, match="gathered 3 groups of 3 prompts for 5 prompts"):
        ranks.gather(mine if rank else [], prompts)


def tally() -> None:
    """All ranks count together; with enough, prompts may be missing, and none be there twice."""
    rank = dist.get_rank()
    store = dist.PrefixStore("tallies", dist.distributed_c10d._get_default_store())
    ranks = distributed.WorldRanks(TIMEOUT_S, store)
    window = FilterSection(min_accuracy=0.5, max_accuracy=0.5)
    right, half = answered(10 * rank, 1.0, 1.0), answered(10 * rank + 1, 1.0, 0.0)
    prompts = [answered(10 * r + n, 1.0, 0.0).prompt for r in range(4) for n in range(3)]
    for _ in range(2):  # each round counts from 0
        enough = ranks.tally(4, window)
        dist.barrier()
        assert not enough.reached()
        enough.add(right)
        if rank != 2:
            enough.add(half)
        dist.barrier()
        assert not enough.reached(), "three of four have passed"
        dist.barrier()
        with pytest.raises(RuntimeError, match="gathered 8 groups of 8 prompts for 12 prompts"):
            ranks.gather([right, half], prompts, enough)
        dist.barrier()  # all have seen that it is not enough
        if rank == 2:
            enough.add(half)
        found = ranks.gather([half] if rank == 1 else [half, right], prompts, enough)
        assert enough.reached()
        assert [group.prompt.prompt_id for group in found] == [0, 1, 11, 20, 21, 30, 31]
        with pytest.raises(RuntimeError, match="gathered 5 groups of 4 prompts"):
            ranks.gather([right, right] if rank == 0 else [right], prompts, enough)
        with pytest.raises(RuntimeError, match="gathered 4 groups of 4 prompts for 2"):
            ranks.gather([right], prompts[:2], enough)


def answered(prompt_id: int, *rewards: float) -> VerifiedGroup:
    rollout = Rollout((3,), (-0.5,), "stop", 0, "")
    return replace(
        group_of(prompt_id, 0), rollouts=(rollout,) * len(rewards), outcome_rewards=rewards
    )


def group_of(prompt_id: int, mark: int) -> VerifiedGroup:
    return VerifiedGroup(Prompt(prompt_id, (1,), "", "math", ""), (), (), checker_failures=mark)


class Tested:
    """The cases of one model in one layout."""

    def __init__(self, folder: Path, name: str, layout: str, sizes: ParallelSizes) -> None:
        self.folder, self.name, self.layout = folder, name, layout
        self.hf_dir = folder / name
        self.truth = torch.load(folder / f"{name}.pt")
        self.shape = ModelShape.from_hf(self.hf_dir, sizes.tp)
        self.megatron = megatron_options(sizes)

    def cases(self) -> list[Callable[[], None]]:
        chosen = [self.logprobs, self.round_trip]
        if self.megatron["tensor_model_parallel_size"] > 1:
            chosen.append(self.sequence_parallel)
        if self.name in ("tied", "untied"):
            chosen.append(self.copies)
        return [*chosen, self.export] if self.layout in EXPORTED else chosen

    def model(self, precision: Any = "fp32", **megatron: Any) -> Any:
        options = {**self.megatron, **megatron}
        chunks = build_model(self.shape, PrecisionOptions(dtype=precision), options)
        load_hf(chunks, self.hf_dir, self.shape)
        return chunks

    def logprobs(self) -> None:
        """Against transformers, which saw one row at a time."""
        self.check_logprobs(self.model())

    def sequence_parallel(self) -> None:
        """The same with activations split over the sequence."""
        self.check_logprobs(self.model(sequence_parallel=True))

    def check_logprobs(self, chunks: Any) -> None:
        """In large packs, in small ones, and unpacked: one row at a time on each replica."""
        sequences = [TokenSequence(tuple(ids), prompt) for ids, prompt in self.truth["sequences"]]
        for max_tokens in (120, 40):
            engine = Engine(chunks, self.shape, max_tokens, temperature=1.0)
            outputs = engine._schedule(sequences, range(len(sequences)), loss=None)
            logprobs, entropy, _ = engine._assemble(outputs, sequences)
            assert_close(logprobs, self.truth["logprobs"], 1e-5)
            assert_close(entropy, self.truth["entropy"], 1e-5)
        copies = engine.grid.dp_size * engine.grid.multiple
        for row, sequence in enumerate(sequences[:4]):
            alone = engine.logprobs([sequence] * copies)
            assert_close(
                alone,
                self.truth["logprobs"][row : row + 1, : alone.shape[1]].expand_as(alone),
                1e-5,
            )

    def round_trip(self) -> None:
        """load_hf, then gather: bit for bit what is in the file, on every rank, in both types."""
        truth = dict(HfCheckpoint(self.hf_dir).tensors())
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = self.model(precision)
            for bucket_bytes in (1, 50_000, 2**28):
                pairs = list(gather_hf_tensors(model, self.shape, bucket_bytes))
                found = dict(pairs)
                assert len(pairs) == len(found)
                assert found.keys() == truth.keys()
                for name, tensor in found.items():
                    assert tensor.dtype == dtype, name
                    assert tensor.is_contiguous(), name
                    assert torch.equal(tensor, truth[name].to(dtype)), name

    def copies(self) -> None:
        """Random weights are the same in all replicas; a tied output layer is the embedding."""
        model = build_model(self.shape, PrecisionOptions(dtype="fp32"), self.megatron)
        parameters = [p.detach().flatten() for chunk in model for p in chunk.parameters()]
        ours = [torch.cat(parameters)]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        replicas = [torch.empty_like(ours[0]) for _ in range(group.size())]
        dist.all_gather(replicas, ours[0], group=group)
        assert all(torch.equal(replica, ours[0]) for replica in replicas)
        assert ours[0].std() > 0.01
        for of in (model, self.model()):
            embedding = dict(gather_hf_tensors(of, self.shape))["model.embed_tokens.weight"]
            if parallel_state.is_pipeline_last_stage() and self.shape.tied_embeddings:
                rank = parallel_state.get_tensor_model_parallel_rank()
                weight = of[-1].shared_embedding_or_output_weight()
                mine = embedding[rank * len(weight) : (rank + 1) * len(weight)]
                assert torch.equal(weight[: len(mine)], mine)

    def export(self) -> None:
        """Written twice into the same directory, in many files, then in one or many."""
        model = self.model()
        tp = self.megatron["tensor_model_parallel_size"]
        out_dir = self.folder / f"{self.name}-{self.layout}"
        export_hf(model, self.shape, self.hf_dir, out_dir, shard_bytes=10_000)
        shards = len(list(out_dir.glob("*.safetensors")))
        dist.barrier()  # rank 0 must not replace the files before all have counted them
        export_hf(model, self.shape, self.hf_dir, out_dir, shard_bytes=10**9 if tp == 1 else 50_000)
        found = dict(HfCheckpoint(out_dir).tensors())
        truth = dict(HfCheckpoint(self.hf_dir).tensors())
        assert shards > 5
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        assert ModelShape.from_hf(out_dir, tp) == self.shape


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
