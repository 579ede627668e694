"""Which knobs may change when a run is continued: those that change nothing of what it computes.

Of a PRIME run every knob counts but a list of free ones. A stage has few knobs of its own among the
many of a run's table; of it only these count.
"""

from __future__ import annotations

from typing import Any

from megatron_prime.config import RunConfig
from megatron_prime.config_file import flatten

FREE = (
    "run.folder",
    "run.steps",
    "run.timeout_s",
    "run.lost_after_s",
    "data.train",  # its content is compared by the prompt stream
    "data.eval",
    "rollout.batch_size",
    "rollout.max_rounds",
    "rollout.mismatch_alarm",
    "policy.micro_batch_tokens",
    "prm.micro_batch_tokens",
    "critic.micro_batch_tokens",
    "verify.",
    "evaluate.",
    "checkpoint.",
    "memory.",
    "deadline.",
    "sft.",
    "train_prm.",
    "score.",
    "debug.on_not_finite",
    "debug.save_rollouts",
    "megatron.",
)
COUNT = {
    "train": ("",),
    "sft": ("run.seed", "model.", "precision.policy.", "sft."),
    "train_prm": (
        "run.seed",
        "model.",
        "precision.prm.",
        "precision.reference.",
        "prm.",
        "train_prm.",
        "rollout.group_size",
    ),
}
FREE_OF = {
    "train": FREE,
    "sft": ("sft.data", "sft.held_out", "sft.output", "sft.steps", "sft.micro_batch_tokens"),
    "train_prm": (
        "train_prm.data",  # what is learnt is compared by its stream
        "train_prm.held_out",
        "train_prm.output",
        "train_prm.steps",
        "prm.micro_batch_tokens",
        "prm.measure_after",
        "prm.forward",
    ),
}
LENGTH = {"train": "run.steps", "sft": "sft.steps", "train_prm": "train_prm.steps"}


def changed_knobs(command: str, began_with: dict[str, Any], config: RunConfig) -> list[str]:
    """What differs from a run of `command` that began with other knobs, a line each."""
    now = flatten(config.model_dump(mode="json"))
    must = {"run": {"folder": "-"}, "model": {"hf": "-"}, "data": {"train": "-"}}
    defaults = RunConfig.model_validate(must).model_dump(mode="json")
    before = flatten(defaults) | flatten(began_with)  # a knob of later was at its default
    schedules = {
        "train": (config.policy.schedule, config.prm.schedule, config.critic.schedule),
        "sft": (config.sft.schedule,),
        "train_prm": (config.prm.schedule,),
    }
    bent = LENGTH[command] if "cosine" in schedules[command] else None  # by more steps
    free = tuple(knob for knob in FREE_OF[command] if knob != bent)
    return [
        f"{knob}: began with {before.get(knob)!r}, found {now.get(knob)!r}"
        for knob in sorted(before.keys() | now.keys())
        if before.get(knob) != now.get(knob)
        and knob.startswith(COUNT[command])
        and not knob.startswith(free)
    ]
