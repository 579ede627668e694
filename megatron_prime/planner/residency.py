"""Which buffers lie on the device in which phase: tables, and nothing else.

A buffer is named after its owner and its kind: `policy.masters`, `engine.kv_cache`. `RESIDENT`:
everything stays where it is. `NEEDED`: a phase finds only what it works with. There, gradients and
key/value cache hold nothing between phases and are freed; 16-bit weights of a sleeping model are
dropped, for its masters can make them again; what can't be made again (`KEPT`) goes to host memory.
The engine gets its weights at each sync and keeps them until it has generated. Between the two,
`choose` lets go of as little as makes everything fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Buffers = frozenset[str]
Table = Mapping[str, Buffers]  # by phase

PHASES = (
    "generate",  # the names of protocols.Phase, which can't be imported without torch
    "score",
    "update_prm",
    "update_critic",
    "update_policy",
    "sync_weights",
    "evaluate",
    "checkpoint",
)
GENERATE, SCORE, UPDATE_PRM, UPDATE_CRITIC, UPDATE_POLICY, *_OTHERS = PHASES
SYNC_WEIGHTS, EVALUATE, CHECKPOINT = _OTHERS
OF_MODEL: Mapping[str, str] = {UPDATE_PRM: "prm", UPDATE_CRITIC: "critic"}  # not in all runs
START = "start"  # before the first phase
MOVES: Mapping[str, frozenset[str]] = {  # what may follow what
    START: frozenset({SYNC_WEIGHTS, GENERATE, EVALUATE}),
    GENERATE: frozenset({SCORE, UPDATE_POLICY}),
    SCORE: frozenset({UPDATE_PRM, UPDATE_CRITIC, UPDATE_POLICY}),
    UPDATE_PRM: frozenset({UPDATE_CRITIC, UPDATE_POLICY}),
    UPDATE_CRITIC: frozenset({UPDATE_POLICY}),
    UPDATE_POLICY: frozenset({SYNC_WEIGHTS, GENERATE, EVALUATE, CHECKPOINT}),
    SYNC_WEIGHTS: frozenset({GENERATE, EVALUATE, CHECKPOINT}),
    EVALUATE: frozenset({GENERATE, CHECKPOINT}),
    CHECKPOINT: frozenset({GENERATE, CHECKPOINT}),
}
STATES = ("weights", "fp8_copies", "gradients", "masters", "moments")


def _of(owner: str, *kinds: str) -> Buffers:
    return frozenset(f"{owner}.{kind}" for kind in kinds)


POLICY, PRM, CRITIC = (_of(owner, *STATES) for owner in ("policy", "prm", "critic"))
REFERENCE = _of("reference", "weights", "fp8_copies")
ENGINE = _of("engine", "weights", "kv_cache", "cuda_graphs")
SYNC = _of("sync", "buffers")
ALL = POLICY | PRM | CRITIC | REFERENCE | ENGINE | SYNC

RESIDENT: Table = dict.fromkeys(PHASES, ALL)
NEEDED: Table = {
    GENERATE: ENGINE | SYNC,
    SCORE: _of("policy", "weights", "fp8_copies") | REFERENCE | SYNC,
    UPDATE_PRM: PRM | SYNC,
    UPDATE_CRITIC: CRITIC | SYNC,
    UPDATE_POLICY: POLICY | SYNC,
    SYNC_WEIGHTS: _of("policy", "weights") | _of("engine", "weights") | SYNC,
    EVALUATE: ENGINE | SYNC,
    # Masters and moments are saved from the host; nobody could give the engine its weights back.
    CHECKPOINT: frozenset(f"{owner}.weights" for owner in ("policy", "prm", "critic", "engine"))
    | SYNC,
}
_NOT_TO_SCORE = _of("policy", "weights", "fp8_copies")
WRITTEN: Table = {  # what a phase changes; elsewhere a copy on the host stays good
    UPDATE_PRM: PRM,
    UPDATE_CRITIC: CRITIC,
    UPDATE_POLICY: POLICY,
}
MADE_FROM: Mapping[str, str] = {
    "policy.weights": "policy.masters",
    "prm.weights": "prm.masters",
    "critic.weights": "critic.masters",
}

KEPT: Buffers = REFERENCE.union(
    *(_of(owner, "masters", "moments") for owner in ("policy", "prm", "critic"))
)
WITHOUT_MASTERS: Mapping[str, Buffers] = {  # an fp32 model's weights are, a frozen one has none
    "policy": _of("policy", "weights"),
    "prm": _of("prm", "weights"),
    "critic": _of("critic", "weights"),
}


def on_host(table: Table, without_masters: frozenset[str]) -> Buffers:
    """What has a copy in host memory: all that nothing makes again, unless everything stays.

    At the start of a run everything is sent away once, so that servers find the device empty, and
    a page-locked copy, once made, is kept (runtime/memory.py).
    """
    if table is RESIDENT:
        return frozenset()
    return KEPT.union(*(WITHOUT_MASTERS.get(model, frozenset()) for model in without_masters))


# What goes first when not everything fits: what costs nothing to bring back, then what is copied
# one way, then what is copied both ways. Who leaves takes nobody along: weights are made from
# masters that stay, as long as those do.
CHEAPEST_FIRST = (
    "policy.gradients",
    "prm.gradients",
    "critic.gradients",
    "engine.kv_cache",
    "engine.cuda_graphs",
    "engine.weights",
    "policy.fp8_copies",
    "prm.fp8_copies",
    "critic.fp8_copies",
    "reference.fp8_copies",
    "prm.weights",
    "critic.weights",
    "policy.weights",
    "reference.weights",
    "prm.moments",
    "critic.moments",
    "policy.moments",
    "prm.masters",
    "critic.masters",
    "policy.masters",
)


def needed(scores_policy: bool) -> Table:
    """NEEDED, of a run whose policy is asked for old log-probs before its update, or is not."""
    return NEEDED if scores_policy else {**NEEDED, SCORE: NEEDED[SCORE] - _NOT_TO_SCORE}


def choose(
    kept: Mapping[str, int], work: Mapping[str, int], budget: int, least: Table = NEEDED
) -> Table:
    """The table that lets go of as little as fits; `least` if nothing does.

    `kept`: bytes of each buffer; `work`: what each phase needs beside those that lie there;
    `budget`: bytes of the device, without the reserve.
    """
    leaving: list[str] = []
    for name in CHEAPEST_FIRST:
        if _fits(_without(leaving, least), kept, work, budget):
            break
        leaving.append(name)
    for name in reversed(leaving):  # the dearest first: a later one may have made room for all
        others = [other for other in leaving if other != name]
        if _fits(_without(others, least), kept, work, budget):
            leaving = others
    return _without(leaving, least)


def _without(leaving: Iterable[str], least: Table) -> Table:
    """Everything resident but `leaving`, which are there only when they are needed."""
    stays = ALL - frozenset(leaving)
    return {phase: stays | least[phase] for phase in PHASES}


def _fits(table: Table, kept: Mapping[str, int], work: Mapping[str, int], budget: int) -> bool:
    return all(
        sum(n for name, n in kept.items() if name in row)
        + max(work.get(phase, 0), borrowed(row, kept))
        <= budget
        for phase, row in table.items()
    )


def borrowed(row: Buffers, kept: Mapping[str, int]) -> int:
    """Bytes of masters that are there for a moment only, to make weights from."""
    return max(
        (
            kept.get(masters, 0)
            for weights, masters in MADE_FROM.items()
            if weights in row and masters not in row
        ),
        default=0,
    )
