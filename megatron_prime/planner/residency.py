"""Which buffers lie on the device in which phase: a table, and nothing else.

A buffer is named after its owner and its kind: `policy.masters`, `engine.kv_cache`. Two variants:
`RESIDENT`, where everything stays where it is (what runs do today), and `OFFLOADED`, where a phase
finds only what it works with. There, gradients and key/value cache hold nothing between phases and
are freed; bf16 weights of a sleeping model are dropped, for its masters can make them again; what
can't be made again (`KEPT`) goes to host memory. The engine gets its weights at each sync and keeps
them until it has generated.
"""

from __future__ import annotations

from collections.abc import Mapping

Buffers = frozenset[str]

GENERATE, SCORE, UPDATE_PRM, UPDATE_POLICY, SYNC_WEIGHTS, EVALUATE, CHECKPOINT = PHASES = (
    "generate",  # the names of protocols.Phase, which can't be imported without torch
    "score",
    "update_prm",
    "update_policy",
    "sync_weights",
    "evaluate",
    "checkpoint",
)
STATES = ("weights", "fp8_copies", "gradients", "masters", "moments")


def _of(owner: str, *kinds: str) -> Buffers:
    return frozenset(f"{owner}.{kind}" for kind in kinds)


POLICY, PRM = _of("policy", *STATES), _of("prm", *STATES)
REFERENCE = _of("reference", "weights", "fp8_copies")
ENGINE = _of("engine", "weights", "kv_cache")
SYNC = _of("sync", "buffers")
ALL = POLICY | PRM | REFERENCE | ENGINE | SYNC

RESIDENT: Mapping[str, Buffers] = dict.fromkeys(PHASES, ALL)
OFFLOADED: Mapping[str, Buffers] = {
    GENERATE: ENGINE,
    SCORE: _of("policy", "weights", "fp8_copies") | REFERENCE,
    UPDATE_PRM: PRM,
    UPDATE_POLICY: POLICY,
    SYNC_WEIGHTS: _of("policy", "weights") | _of("engine", "weights") | SYNC,
    EVALUATE: ENGINE,
    CHECKPOINT: _of("policy", "weights") | _of("prm", "weights"),
}

KEPT: Buffers = _of("policy", "masters", "moments") | _of("prm", "masters", "moments") | REFERENCE
WITHOUT_MASTERS: Mapping[str, Buffers] = {  # an fp32 model's weights are its masters
    "policy": _of("policy", "weights"),
    "prm": _of("prm", "weights"),
}


def on_host(phase: str, table: Mapping[str, Buffers], fp32_models: frozenset[str]) -> Buffers:
    """What host memory holds in a phase, because it is neither on the device nor made again."""
    kept = KEPT.union(*(WITHOUT_MASTERS.get(model, frozenset()) for model in fp32_models))
    return kept - table[phase]
