"""What the tables of a run's configuration are made of, and the tables with the most knobs.

`config.py` puts all tables together and is where others import from; the tables here are those of
the mathematics, of the rollout engine and of the verifier. No torch, no Megatron.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[Path, Field(strict=False)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # of files and of metrics, too


class Section(BaseModel):
    """Base of all tables: frozen, strict, no unknown keys; attribute docstrings become help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class OptimizerSection(Section):
    """AdamW with fp32 master weights, warm-up, then constant or cosine."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are exempt."""
    clip_grad: PositiveFloat = 1.0
    """Largest global gradient norm."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; `cosine` ends at 0 with the last step."""


class BatchSection(OptimizerSection):
    """How one step's rollouts are cut up for an update."""

    mini_batch_size: Positive = 256
    """Rollouts per optimizer step."""
    micro_batch_tokens: Positive = 8192
    """Tokens that one rank puts through the model at once; what fills a pack up to a multiple that
    FP8, sequence parallelism or a pipeline wants comes on top."""


class CriticSection(BatchSection):
    """The critic of `advantage.estimator = "gae"` and its update; see docs/algorithm.md."""

    hf: FilePath | None = None
    """Start the critic from this checkpoint, its value head (`score.weight`) included if it has
    one; none takes `model.hf` and a head of zeros."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    value_clip: PositiveFloat | None = 0.5
    """A value that has moved further than this from what it was before the update has no gradient
    that leads further; not set: no such end."""


class AdvantageOptions(Section):
    """Token advantages from process and outcome rewards; formulae in `algorithm/advantage.py`."""

    estimator: Literal["rloo", "grpo", "reinforce", "prime_value", "gae"] = "rloo"
    """What rewards are compared with: `rloo`, the group's other responses; `grpo`, the whole
    group's mean, over its standard deviation (`group_std`); `reinforce`, nothing; `prime_value`,
    nothing, but process rewards up to the token are taken off as the value of what precedes it;
    `gae`, the values of a critic (PPO), see `[critic]`."""
    group_std: bool = True
    """Of `grpo`: divide by the standard deviation within the group; false leaves it out."""
    granularity: Literal["token", "step", "response"] = "token"
    """Where process rewards stand: at each `token`; their sum over a step at the step's last token;
    or their sum over the `response` at its last token."""
    step_separator: Annotated[str, Field(min_length=1)] = "\n\n"
    """Of `granularity = "step"`: the text that ends a step; the response's last token ends one,
    too."""
    process_baseline: Literal["released", "paper"] = "released"
    """Of `rloo`, leave-one-out of process rewards: `released` (as in the authors' code,
    K/(K-1) r_t - sum of means/(K-1)) or `paper` (r_t minus the mean of the other responses' mean
    rewards)."""
    process_norm: Literal["batch_norm", "none"] = "batch_norm"
    """`batch_norm` divides process rewards by the largest absolute return-to-go of the whole batch;
    `none` leaves them."""
    whiten: bool = True
    """Subtract the mean, divide by the standard deviation, of all response tokens of the batch,
    but those without a loss (`filter.truncated = "mask"`)."""
    gamma: Fraction = 1.0
    """Discount of future process rewards. The outcome reward is never discounted, but by `gae`,
    whose critic has one value for both."""
    gae_lambda: Fraction = 1.0
    """Of `gae`: what a token is credited with, from 1, all rewards to come and no later value (the
    paper's: no bias), to 0, its own reward and the value of the next token alone (least
    variance)."""
    process_weight: NonNegativeFloat = 1.0
    """Weight of the process advantage; 0 trains on the outcome alone and no PRM is loaded, nor a
    reference, unless `policy.loss.kl_coefficient` wants it."""
    outcome_weight: NonNegativeFloat = 1.0
    """Weight of the outcome advantage."""

    @classmethod
    def preset(cls, name: Literal["released", "paper"]) -> Self:
        """The options of the authors' code (`released`) or of the paper's formulae (`paper`)."""
        return cls(**ADVANTAGE_PRESETS[name])


ADVANTAGE_PRESETS: dict[str, dict[str, Any]] = {
    "released": {"process_baseline": "released", "process_norm": "batch_norm", "whiten": True},
    "paper": {"process_baseline": "paper", "process_norm": "none", "whiten": False},
}


class PolicyLossOptions(Section):
    """The clipped surrogate of `algorithm/policy_loss.py`."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Ratios outside [1 - clip, 1 + clip] get no gradient in the direction that leads further
    out."""
    clip_high: PositiveFloat | None = None
    """Distance of the upper end, 1 + clip_high, if it is another than the lower one's; not set:
    `clip`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: where the advantage A is negative, the loss is at most -dual_clip * A, so that a
    ratio above it has no gradient; not set: no such end."""
    aggregation: Literal["seq_mean_token_mean", "token_mean"] = "seq_mean_token_mean"
    """Mean over responses of each response's token mean (the released run), or one mean over all
    tokens."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus (released run: 0)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence from the reference, the frozen weights that the run starts from
    (`model.weights`, else `model.hf`), in the loss (released run: 0)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How each token estimates it, with d = log(policy / reference): `k1`, d times the ratio, `k2`,
    d²/2, or `k3`, exp(-d) - 1 + d; their gradients differ, see `algorithm/policy_loss.py`."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Truncated importance weights for what the rollout engine's numerics differ from the
    trainer's: of each `token`, or of a whole response, the product of its tokens' (`sequence`)."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight; larger ones are cut to it."""


class RolloutSection(Section):
    """Sampling of responses."""

    engine: Literal["local", "sglang"] = "local"
    """`local`: an embedded `transformers` model in each rank's process; `sglang`: SGLang servers on
    the same devices as the trainer."""
    group_size: Positive = 4
    """Responses per prompt (the paper's K)."""
    prompts_per_step: Positive = 256
    """Prompts that must pass the filter before a step trains."""
    prompts_per_round: NonNegative = 0
    """Prompts drawn in each generation round; 0 takes `prompts_per_step`."""
    max_rounds: Positive = 8
    """Generation rounds before a step that can't fill its batch stops the run with the counts."""
    max_response_length: Positive = 3072
    """Longer responses are cut and count as truncated."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the policy's log-probs are taken at the same temperature."""
    batch_size: Positive = 128
    """Sequences that one rank of the local engine decodes at once."""
    mismatch_alarm: PositiveFloat | None = 0.05
    """A step whose `rollout/mismatch_kl` (nats per token between engine and trainer) is above this
    is called out; not set: none is."""
    abort_surplus: bool = False
    """End a round as soon as enough prompts have passed the filter, and put the prompts that are
    still being answered back (the local engine: those it has not begun). It shortens the wait for
    the longest responses, and so favours prompts with short ones; which prompts make it depends on
    the clock, so two runs differ."""
    keep_partial: bool = False
    """With `abort_surplus`: keep what was sampled of the responses that were ended, and go on from
    there in the next step; tokens, groups and batches are then of several policies, and
    `policy.old_logprobs = "rollout"` is needed."""
    tensor_parallel_size: Positive = 1
    """Of SGLang: ranks that one server is split over."""
    groups_in_flight: Positive = 256
    """Of SGLang: prompts that one server works on at once, at most; three quarters of its share of
    a round if that is less and there are several servers."""
    fp8_weights: bool = False
    """Of SGLang: linear layers in FP8 (e4m3, blocks of 128 × 128), rounded at each sync."""
    sync_bucket_mib: PositiveFloat = 256.0
    """Of SGLang: size of each of the two buffers that new weights pass through, per rank."""
    sglang_python: FilePath | None = None
    """Interpreter that has SGLang installed; not set: the one that runs the trainer."""
    start_timeout_s: PositiveFloat = 900.0
    """Of SGLang: how long a server may take to start."""
    request_timeout_s: PositiveFloat = 1800.0
    """Of SGLang: how long a server may take over the responses to one prompt, its queue included.
    They are asked for once more, with twice the time, before the server counts as hung."""
    hang_timeout_s: PositiveFloat = 300.0
    """Of SGLang: a server that shows no sign of life for so long while it generates is
    restarted."""
    sync_timeout_s: PositiveFloat = 300.0
    """Of SGLang: how long a server may take over one bucket of new weights."""
    max_restarts: NonNegative = 3
    """Of SGLang: how often one server may fail in a step before the run stops."""


class EvaluateSection(Section):
    """Accuracy on `data.eval` and on benchmark sets; see docs/evaluation.md."""

    every: NonNegative = 16
    """Steps between evaluations during training; 0 evaluates only before the first and after the
    last step."""
    max_prompts: NonNegative = 0
    """Evaluate on the first this many prompts of each file; 0 takes all."""
    sets: dict[SetName, FilePath] = Field(default={})
    """Benchmark sets, a file for each: aime2024, amc, math500, minerva, olympiadbench, leetcode,
    livecodebench with the paper's token limits, or any other name. `evaluate` takes these instead
    of `data.eval`; training logs each one's greedy accuracy as well."""
    policy: FilePath | None = None
    """Weights to evaluate: a Hugging Face checkpoint, or a run's `checkpoints/step_…`, of the
    architecture and with the tokenizer of `model.hf`; not set: those of `model.hf`."""
    greedy: bool = True
    """Answer each problem of `sets` once with the most likely tokens (pass@1 of the paper)."""
    samples: NonNegative = 0
    """Responses that `evaluate` samples to each problem of `sets` (avg@k, pass@k, maj@k,
    best-of-N); 0 samples none. The paper's avg@16: 16."""
    temperature: PositiveFloat = 0.3
    """Of those samples."""
    max_response_length: Positive | None = None
    """Longest response to a problem of `sets`; not set: a known set's own limit, and
    `rollout.max_response_length` for others."""
    prm: FilePath | None = None
    """PRM that ranks the samples (best-of-N): a Hugging Face checkpoint, or a run's
    `checkpoints/step_…`; `[prm]`, `[precision]` and `[megatron]` say how it is loaded."""
    reference: FilePath | None = None
    """Hugging Face checkpoint of the reference in the PRM's log-ratio; not set: the `model.hf` of
    the run that `prm` is a checkpoint of, unless that had `prm.reference = "policy"` or
    `prm.forward = "frozen"`."""
    chunk: Positive = 64
    """Problems that are answered and written together: a killed evaluation loses at most these, and
    with more the engines are busy with fewer gaps."""


class VerifySection(Section):
    """The outcome verifier's worker processes."""

    workers: Positive = 1
    """Checker processes per rank."""
    timeout_s: PositiveFloat = 5.0
    """A check of mathematics that takes longer is killed, scores 0 and is counted."""
    code_test_s: PositiveFloat = 5.0
    """A program that takes longer over one test has failed it."""
    code_total_s: PositiveFloat = 50.0
    """Tests of a response that are not done by then count as failed."""
    code_memory_mib: Positive = 1024
    """Memory that a program may take."""
    numpy: bool = False
    """Whether programs may import NumPy, the one that is installed here."""
    sandbox: Literal["kernel", "none"] = "kernel"
    """What keeps programs in: Landlock and seccomp, or nothing but limits of time and memory: only
    where the cluster itself isolates the job."""
