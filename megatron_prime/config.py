"""Every knob of a run, typed, each with a sentence.

One knob has one owner: it is declared here and nowhere else. Unknown keys and wrong types are
errors. The module imports neither torch nor Megatron, so that a config can be checked on a login
node in a moment; `config_file.py` reads and prints it, `validate.py` adds the checks that need two
knobs or the model's own config.json.

Upstream options are not mirrored: what stands in `[megatron]` goes untouched to Megatron's
`TransformerConfig`, what stands in `[sglang]` to SGLang's server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_prime.errors import RunError
from megatron_prime.options import ADVANTAGE_PRESETS as ADVANTAGE_PRESETS
from megatron_prime.options import AdvantageOptions as AdvantageOptions
from megatron_prime.options import BatchSection as BatchSection
from megatron_prime.options import CriticSection as CriticSection
from megatron_prime.options import (
    EvaluateSection,
    FilePath,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RolloutSection,
)
from megatron_prime.options import PolicyLossOptions as PolicyLossOptions
from megatron_prime.options import Section as Section
from megatron_prime.options import VerifySection as VerifySection
from megatron_prime.stage_options import ScoreSection, SftSection, TrainPrmSection

ModelName = Literal["policy", "prm", "reference", "critic"]
PrmLoss = Literal["ce", "ce_hard", "dpo", "nca", "kto"]


class ConfigError(RunError, ValueError):
    """A configuration that can't run; the message lists every problem with its knob."""


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """How many ranks a replica of the model is split over."""

    tp: int = 1  # tensor-parallel
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel
    vpp: int = 1  # virtual stages on each pipeline stage; 1: no interleaving

    @property
    def replica(self) -> int:
        """Ranks that hold one replica together."""
        return self.tp * self.pp * self.cp


class RunSection(Section):
    """What the run is called and how long it lasts."""

    folder: FilePath
    """Everything the run writes: checkpoints, metrics, TensorBoard logs, curves, resolved
    config."""
    seed: NonNegative = 0
    """Seeds data order, sampling and initialisation."""
    steps: Positive = 100
    """Policy updates; each is one filtered batch of prompts."""
    timeout_s: PositiveFloat = 1800.0
    """How long a rank waits in a collective for one that is lost or stuck."""
    lost_after_s: PositiveFloat = 45.0
    """A rank that shows no sign of life for so long is given up, and the run ends. Not about slow
    steps: a rank that computes or waits shows signs of life. See docs/operations.md."""


class ModelSection(Section):
    """The model that policy, PRM, reference and critic start from."""

    hf: FilePath
    """Hugging Face checkpoint directory (config.json, safetensors, tokenizer)."""
    weights: FilePath | None = None
    """Start from the weights in this distributed checkpoint, of `tools/convert_hf_to_megatron.py`
    or the policy's of a run's `checkpoints/step_…`; config.json and tokenizer are still those of
    `hf`. Not set: the safetensors of `hf`."""

    @property
    def start(self) -> Path:
        """Where the weights are."""
        return self.weights or self.hf


class PrecisionOptions(Section):
    """Number formats of one model; what they mean is told in `models/precision.py`."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations; the optimizer's master weights are fp32 in any case."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """FP8 matrix products in the layers: `hybrid` (E4M3, gradients E5M2) or `e4m3`; not set: no
    FP8. For the PRM it is best left off, for its log-ratios are differences of near numbers."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 values are scaled: by the maxima of past steps, per tensor, per block of 128, or per
    block of 32 (Blackwell)."""
    fp8_param: bool = False
    """Keep the layers' weights in FP8 only, next to the fp32 master weights; not with `delayed`."""
    first_last_layers_bf16: bool = False
    """Leave the first and last layers in bf16; not with `delayed`."""
    num_layers_at_start_in_bf16: NonNegative = 1
    """How many layers `first_last_layers_bf16` leaves at the start."""
    num_layers_at_end_in_bf16: NonNegative = 1
    """How many layers `first_last_layers_bf16` leaves at the end."""
    loss_scale: PositiveFloat | None = None
    """Of fp16: a fixed factor of the loss; not set: a factor that follows the overflows."""
    initial_loss_scale: PositiveFloat = 65536.0
    """Of fp16: the first factor; it is halved when gradients overflow."""
    min_loss_scale: PositiveFloat = 1.0
    """Of fp16: the smallest factor; an overflow there stops the run."""
    loss_scale_window: Positive = 1000
    """Of fp16: optimizer steps without an overflow before the factor is doubled."""
    hysteresis: Positive = 2
    """Of fp16: overflows before the factor is halved."""


class PrecisionSection(Section):
    """Number formats of each model; `sft` and the rollout engine go by the policy's."""

    policy: PrecisionOptions = PrecisionOptions()
    """Of the policy."""
    prm: PrecisionOptions = PrecisionOptions()
    """Of the PRM."""
    reference: PrecisionOptions = PrecisionOptions()
    """Of the reference."""
    critic: PrecisionOptions = PrecisionOptions()
    """Of the critic; its value head gives fp32 in any case."""

    def of(self, model: ModelName) -> PrecisionOptions:
        """The table of one model."""
        options: PrecisionOptions = getattr(self, model)
        return options


class DataSection(Section):
    """Prompts, in jsonl or parquet with the fields of Eurus-2-RL-Data."""

    train: FilePath
    """Training prompts (.jsonl or .parquet)."""
    eval: FilePath | None = None
    """Held-out prompts for `evaluate` and for evaluation during training; none skips it."""
    template: Literal["plain", "prime"] = "prime"
    """`prime`: the paper's action-centric system prompt and the suffix of the ability; `plain`: the
    messages as they are."""
    max_prompt_length: Positive = 1024
    """Prompts of more tokens are counted and dropped."""


class FilterSection(Section):
    """Which prompts train; a window of [0, 1] and `keep` twice let all pass."""

    min_accuracy: Fraction = 0.2
    """Drop prompts the policy solves less often than this; inclusive."""
    max_accuracy: Fraction = 0.8
    """Drop prompts the policy solves more often than this; inclusive."""
    zero_variance: Literal["keep", "drop"] = "keep"
    """Prompts whose responses all earned the same: of right and wrong answers the window's ends
    drop them, but not of partly right ones."""
    truncated: Literal["keep", "drop", "mask"] = "keep"
    """Prompts with a response that was cut at `rollout.max_response_length`. `mask` keeps them, but
    policy and critic learn nothing of the cut responses (overlong filtering): the PRM does, and
    they stay in their group's baseline, but the policy is not told off for what may have been right
    had it been allowed to end."""


class PolicySection(BatchSection):
    """Update of the policy."""

    lr: PositiveFloat = 5e-7
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay; norms and biases are exempt."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Whose log-probs of the sampled tokens the update starts from: the `trainer`'s, of its weights
    before the update (for the first mini-batch its training forward's, so that an update of a
    single mini-batch needs no scoring), or the engine's, token by token, as they were sampled
    (`rollout`)."""
    loss: PolicyLossOptions = PolicyLossOptions()
    """Options of the clipped policy loss."""


class PrmSection(BatchSection):
    """The implicit process reward model and its update."""

    hf: FilePath | None = None
    """Start the PRM from this checkpoint; none takes `model.hf`."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    clip_grad: PositiveFloat = 10.0
    """Largest global gradient norm."""
    beta: PositiveFloat = 0.05
    """Scale of the implicit reward beta * log(prm / ref)."""
    loss: PrmLoss = "ce"
    """What the outcome teaches: cross-entropy of sigmoid(R) with the outcome (`ce`) or with whether
    it is 1 (`ce_hard`), or a comparison of responses: all pairs of a group whose outcomes differ
    (`dpo`, `nca`), or right against wrong ones (`kto`); these three cost a forward pass more."""
    reference: Literal["frozen", "policy"] = "frozen"
    """What the PRM is compared with: `frozen`, the weights of `model.hf`, a model of its own; or
    `policy`, the policy's log-probs of before its update, and no third model is loaded."""
    forward: Literal["single", "single_strict", "double", "frozen"] = "single"
    """Where rewards come from: `single`, the training forwards (released run); `single_strict`, one
    pass before the update; `double`, one pass after it; `frozen`, one pass of an offline PRM,
    `prm.hf`, that is never updated and needs no optimizer."""
    measure_after: bool = False
    """Log the pair accuracy after the update too: one more forward pass for a figure alone, or none
    with `forward = "double"`, which shows it in any case."""


class CheckpointSection(Section):
    """Saving and resuming."""

    every: NonNegative = 16
    """Steps between checkpoints; 0 saves only after the last step."""
    keep: NonNegative = 2
    """Newest checkpoints that stay on disk; 0 keeps all."""


class MemorySection(Section):
    """What lies on a device in which phase; see docs/scheduler.md."""

    offload: Literal["auto", "never", "always"] = "auto"
    """What leaves the device while it is not needed: as little as makes the run fit (`auto`),
    nothing, or all of it."""
    device_gib: PositiveFloat | None = None
    """Memory of one rank's device to plan with; not set: all that the GPU has, no limit on a
    CPU."""
    reserve_gib: NonNegativeFloat = 6.0
    """What of it the plan leaves alone: CUDA contexts, NCCL, CUDA graphs, fragmentation. On a
    CPU, nothing."""
    start_anyway: bool = False
    """Start a run that the plan says can't fit."""


class DeadlineSection(Section):
    """Longest time of each phase; then all ranks' stacks are written down and the job ends."""

    generate_s: PositiveFloat = 7200.0
    """Of generation and verification, all rounds of a step."""
    score_s: PositiveFloat = 3600.0
    """Of scoring."""
    update_prm_s: PositiveFloat = 3600.0
    """Of the PRM's update."""
    update_critic_s: PositiveFloat = 3600.0
    """Of the critic's forward and update."""
    update_policy_s: PositiveFloat = 3600.0
    """Of the policy's update."""
    sync_weights_s: PositiveFloat = 3600.0
    """Of a weight sync, restarts of servers included."""
    evaluate_s: PositiveFloat = 14400.0
    """Of an evaluation."""
    checkpoint_s: PositiveFloat = 3600.0
    """Of saving a checkpoint."""


class DebugSection(Section):
    """Looking for what went wrong."""

    on_not_finite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinity in an update does: `stop` the run, or `skip` that mini-batch. One
    found while scoring, or in all mini-batches of an update, always stops it. The first such
    batches are kept for `python -m megatron_prime replay`."""
    save_rollouts: bool = False
    """Write every verified group to `rollouts/` in the run folder."""
    rollouts_from: FilePath | None = None
    """Train on the groups that `save_rollouts` or the command `rollout` wrote to this folder, and
    generate and evaluate nothing."""


def due(step: int, every: int, last: int) -> bool:
    """True on every `every`-th step (0: on none of them) and on the last."""
    return step == last or (every > 0 and step % every == 0)


class RunConfig(Section):
    """A whole run."""

    preset: Literal["released", "paper"] = "released"
    """Defaults of `[advantage]`: the authors' code or the paper's formulae."""
    run: RunSection
    model: ModelSection
    precision: PrecisionSection = PrecisionSection()
    data: DataSection
    rollout: RolloutSection = RolloutSection()
    filter: FilterSection = FilterSection()
    verify: VerifySection = VerifySection()
    policy: PolicySection = PolicySection()
    prm: PrmSection = PrmSection()
    critic: CriticSection = CriticSection()
    advantage: AdvantageOptions = AdvantageOptions()
    sft: SftSection = SftSection()
    train_prm: TrainPrmSection = TrainPrmSection()
    score: ScoreSection = ScoreSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    memory: MemorySection = MemorySection()
    deadline: DeadlineSection = DeadlineSection()
    debug: DebugSection = DebugSection()
    megatron: dict[str, Any] = Field(default={})
    """Options of Megatron's TransformerConfig (tensor_model_parallel_size …), passed untouched."""
    sglang: dict[str, Any] = Field(default={})
    """Options of SGLang's server (mem_fraction_static …), passed untouched."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Let `preset` fill what `[advantage]` leaves open."""
        preset = ADVANTAGE_PRESETS.get(str(data.get("preset", "released")), {})
        given = data.get("advantage", {})
        return {**data, "advantage": {**preset, **given}} if isinstance(given, dict) else data

    @property
    def parallel(self) -> ParallelSizes:
        """How `[megatron]` splits each model."""
        virtual = self.megatron.get("virtual_pipeline_model_parallel_size")
        return ParallelSizes(
            tp=self.megatron.get("tensor_model_parallel_size", 1),
            pp=self.megatron.get("pipeline_model_parallel_size", 1),
            cp=self.megatron.get("context_parallel_size", 1),
            vpp=1 if virtual is None else virtual,
        )

    def is_due(self, step: int, every: int) -> bool:
        """Whether something is due on every `every`-th step, or on the run's last."""
        return due(step, every, self.run.steps)

    def sampling_seed(self, step: int, round_: int) -> int:
        """The seed of one generation round: a random stream of its own."""
        return (self.run.seed * 1_000_000 + step) * 1_000 + round_

    @property
    def uses_prm(self) -> bool:
        """Whether a PRM takes part."""
        return self.advantage.process_weight > 0

    @property
    def policy_is_reference(self) -> bool:
        """Whether the PRM is compared with the policy, which is scored whole for that."""
        return self.uses_prm and self.prm.reference == "policy"

    @property
    def models(self) -> tuple[ModelName, ...]:
        """The models of a run."""
        found: list[ModelName] = ["policy"]
        if self.uses_prm:
            found += ["prm"] if self.policy_is_reference else ["prm", "reference"]
        elif self.policy.loss.kl_coefficient:
            found += ["reference"]
        return (*found, *(("critic",) if self.advantage.estimator == "gae" else ()))

    def own_hf(self, name: str) -> Path | None:
        """The checkpoint that a model starts from, if it is not that of all."""
        return {"prm": self.prm.hf, "critic": self.critic.hf}.get(name)

    def hf_of(self, name: ModelName) -> Path:
        """The checkpoint that a model starts from."""
        return self.own_hf(name) or self.model.hf

    def batches_of(self, name: ModelName) -> BatchSection:
        """How a model's batches are cut; the reference's as the PRM's, or as the policy's."""
        own: dict[str, BatchSection] = {"prm": self.prm, "critic": self.critic}
        if name == "reference" and self.uses_prm:
            return self.prm
        return own.get(name, self.policy)

    @property
    def score_output(self) -> Path:
        """Where `score` writes."""
        return self.score.output or self.run.folder / "scores" / "scores.jsonl"

    @property
    def frozen(self) -> frozenset[ModelName]:
        """Of the models, those that never train and have no optimizer."""
        never: tuple[ModelName, ...] = ("reference",)
        if self.prm.forward == "frozen":
            never = ("reference", "prm")
        return frozenset(never).intersection(self.models)
