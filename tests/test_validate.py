from __future__ import annotations

import json

import pytest

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.validate import check

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
}


def merged(table, changes):
    return {
        **table,
        **{
            key: merged(table.get(key, {}), value) if isinstance(value, dict) else value
            for key, value in changes.items()
        },
    }


@pytest.fixture
def config(tmp_path):
    """A run that is in order; `config(rollout={...})` changes knobs."""
    for name in ("model", "prm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(QWEN))
    for name in ("train.jsonl", "eval.jsonl", "sft.jsonl"):
        (tmp_path / name).touch()
    base = {
        "run": {"folder": tmp_path / "run"},
        "model": {"hf": tmp_path / "model"},
        "data": {
            "train": tmp_path / "train.jsonl",
            "eval": tmp_path / "eval.jsonl",
            "max_prompt_length": 56,
        },
        "rollout": {"group_size": 4, "prompts_per_step": 32, "max_response_length": 200},
        "policy": {"mini_batch_size": 64, "micro_batch_tokens": 256},
        "prm": {"mini_batch_size": 32, "micro_batch_tokens": 256},
        "sft": {"data": tmp_path / "sft.jsonl", "max_length": 256, "micro_batch_tokens": 256},
    }
    return lambda **changes: RunConfig.model_validate(merged(base, changes))


def problems(config, command="train", world_size=None):
    """What `check` finds, a list of lines."""
    try:
        check(config, command, world_size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("command", ["train", "sft", "evaluate"])
@pytest.mark.parametrize("world_size", [None, 1, 2, 8])
def test_a_run_in_order_passes(config, command, world_size):
    assert problems(config(), command, world_size) == []


@pytest.mark.parametrize("command", ["train", "sft", "evaluate"])
def test_a_parallel_run_in_order_passes(config, command):
    parallel = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 3}
    parallel |= {"sequence_parallel": True, "recompute_granularity": "full"}
    assert problems(config(megatron=parallel), command, 24) == []


TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
IMPOSSIBLE = {
    "heads": ({"megatron": {TENSOR: 8}}, 8, TENSOR, "num_attention_heads = 12"),
    "kv heads": ({"megatron": {TENSOR: 3}}, 3, TENSOR, "num_key_value_heads = 4"),
    "ffn": ({"megatron": {TENSOR: 3}}, 3, TENSOR, "intermediate_size = 512"),
    "layers": ({"megatron": {PIPELINE: 4}}, 4, PIPELINE, "num_hidden_layers = 6"),
    "ranks": (
        {"megatron": {TENSOR: 2, PIPELINE: 2}},
        6,
        TENSOR,
        r"2 \* 2 \* 1 = 4 ranks .* 6 ranks",
    ),
    "group": ({"rollout": {"group_size": 1}}, None, "rollout.group_size", "found 1, wanted 2"),
    "policy batch": (
        {"policy": {"mini_batch_size": 48}},
        None,
        "policy.mini_batch_size",
        "found 48, wanted a divisor of .* = 128",
    ),
    "prm batch": (
        {"prm": {"mini_batch_size": 96}},
        None,
        "prm.mini_batch_size",
        "found 96, wanted a divisor of .* = 128",
    ),
    "replicas": (
        {"prm": {"mini_batch_size": 4}},
        8,
        "prm.mini_batch_size",
        "found 4, wanted a multiple of the 8 data-parallel replicas",
    ),
    "window": (
        {"filter": {"min_accuracy": 0.9}},
        None,
        "filter.min_accuracy",
        "0.9, above filter.max_accuracy = 0.8",
    ),
    "too long": (
        {"data": {"max_prompt_length": 57}, "policy": {"micro_batch_tokens": 257}},
        None,
        "data.max_prompt_length, rollout.max_response_length",
        "57 \\+ 200 = 257 tokens, more than the 256 of max_position_embeddings",
    ),
    "micro-batch": (
        {"policy": {"micro_batch_tokens": 255}},
        None,
        "policy.micro_batch_tokens",
        "found 255, wanted 256 or more",
    ),
    "micro-batch over context-parallel ranks": (
        {"prm": {"micro_batch_tokens": 127}, "megatron": {"context_parallel_size": 2}},
        None,
        "prm.micro_batch_tokens",
        "found 127, wanted 128 or more: .* over 2 context-parallel ranks",
    ),
    "context": (
        {"megatron": {"context_parallel_size": 3}},
        4,
        "megatron.context_parallel_size",
        "found 1 . 1 . 3 = 3 ranks per replica, which does not divide the run's 4",
    ),
    "virtual stages without stages": (
        {"megatron": {"virtual_pipeline_model_parallel_size": 2}},
        None,
        "megatron.virtual_pipeline_model_parallel_size",
        "found 2 without pipeline stages",
    ),
    "virtual stages and layers": (
        {"megatron": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 5}},
        None,
        f"megatron.{PIPELINE} * megatron.virtual_pipeline_model_parallel_size",
        "found 10, which does not divide num_hidden_layers = ",
    ),
    "virtual stages and rollouts": (
        {
            "prm": {"mini_batch_size": 2},
            "megatron": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 2},
        },
        4,
        "prm.mini_batch_size",
        "found 2, wanted a multiple of 2 . 2: with",
    ),
    "experts": (
        {"megatron": {"expert_model_parallel_size": 2}},
        None,
        "megatron.expert_model_parallel_size",
        "found 2, not supported \\(only dense",
    ),
    "weights twice": (
        {"policy": {"old_logprobs": "rollout", "loss": {"importance": "token"}}},
        None,
        "policy.loss.importance",
        'found "token" with policy.old_logprobs = "rollout"',
    ),
    "tokens of older policies": (
        {"rollout": {"keep_partial": True, "abort_surplus": True}},
        None,
        "policy.old_logprobs",
        'found "trainer" with rollout.keep_partial, wanted "rollout"',
    ),
    "nothing that could be kept": (
        {"rollout": {"keep_partial": True}, "policy": {"old_logprobs": "rollout"}},
        None,
        "rollout.keep_partial",
        "found true without rollout.abort_surplus",
    ),
    "fp8 shape": (
        {"precision": {"reference": {"fp8": "e4m3"}}, "megatron": {TENSOR: 4}},
        4,
        "precision.reference.fp8_recipe",
        r"multiples of 16, but num_attention_heads \* head_dim / .* 4 = 30 in model.hf",
    ),
    "fp8 options": (
        {"precision": {"prm": {"fp8_param": True}}},
        None,
        "precision.prm.fp8_param",
        "found true without precision.prm.fp8",
    ),
    "fp8 weights that should leave": (
        {
            "precision": {"policy": {"fp8": "hybrid", "fp8_param": True}},
            "memory": {"offload": "always"},
        },
        None,
        "memory.offload",
        'found "always" with precision.policy.fp8_param',
    ),
    "fp8 elsewhere": ({"megatron": {"fp8": "hybrid"}}, None, "megatron.fp8", "move it to .precis"),
    "size": ({"megatron": {TENSOR: "two"}}, 4, f"megatron.{TENSOR}", "found 'two', wanted a whole"),
    "zero": ({"megatron": {PIPELINE: 0}}, 4, f"megatron.{PIPELINE}", "found 0, wanted a whole"),
}


@pytest.mark.parametrize(
    ("changes", "world_size", "knob", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE
)
def test_each_impossible_combination_names_its_knob(config, changes, world_size, knob, message):
    with pytest.raises(ConfigError, match=message) as raised:
        check(config(**changes), "train", world_size)
    lines = [line for line in str(raised.value).splitlines() if knob in line.partition(": ")[0]]
    assert lines, f"no line names {knob}"


def test_partial_responses_are_kept_by_a_run_that_is_made_for_it(config):
    rollout = {"keep_partial": True, "abort_surplus": True}
    assert problems(config(rollout=rollout, policy={"old_logprobs": "rollout"})) == []
    assert problems(config(policy={"loss": {"importance": "sequence"}})) == []


def test_number_formats_matter_where_their_model_is_built(config, tmp_path):
    """The PRM's own checkpoint is held to the PRM's recipe; what isn't built is held to none."""
    (tmp_path / "prm" / "config.json").write_text(json.dumps(QWEN | {"hidden_size": 144}))
    prm = {"fp8": "hybrid", "fp8_recipe": "blockwise"}
    own = {"precision": {"prm": prm}, "prm": {"hf": tmp_path / "prm"}}
    found = problems(config(**own))
    assert found
    assert all(line.startswith("precision.prm.fp8_recipe") for line in found)
    assert all("in prm.hf; take" in line for line in found)
    assert problems(config(**own), "sft") == problems(config(**own), "evaluate") == []
    assert problems(config(**own, advantage={"process_weight": 0.0})) == []
    policy = {"precision": {"policy": prm | {"fp8_param": True}}}
    assert "in model.hf; take" in problems(config(**policy), "sft")[0]
    assert problems(config(**policy), "evaluate") == []


@pytest.mark.parametrize(
    "missing", ["model.hf", "model.weights", "data.train", "data.eval", "prm.hf"]
)
def test_missing_files(config, tmp_path, missing):
    section, key = missing.split(".")
    (found,) = problems(config(**{section: {key: tmp_path / "nowhere"}}))
    assert found.startswith((f"{missing}: no ", f"{missing}: found no "))
    assert str(tmp_path / "nowhere") in found


def test_the_prm_must_be_cut_like_the_policy(config, tmp_path):
    (tmp_path / "prm" / "config.json").write_text(json.dumps(QWEN | {"num_key_value_heads": 1}))
    cut = {"prm": {"hf": tmp_path / "prm"}, "megatron": {TENSOR: 2}}
    (found,) = problems(config(**cut))
    assert found.endswith("num_key_value_heads = 1 of prm.hf")


def with_tokens(folder, size, words=None):
    (folder / "config.json").write_text(json.dumps(QWEN | {"vocab_size": size}))
    if words is not None:
        added = [{"id": len(words), "content": "<end>"}]
        table = {"model": {"vocab": {word: i for i, word in enumerate(words)}}}
        (folder / "tokenizer.json").write_text(json.dumps(table | {"added_tokens": added}))


@pytest.mark.parametrize("role", ["prm", "critic"])
def test_a_model_of_another_vocabulary_is_refused(config, tmp_path, role):
    critic = {"hf": tmp_path / "prm", "mini_batch_size": 64, "micro_batch_tokens": 256}
    own = {"prm": {"hf": tmp_path / "prm"}}
    if role == "critic":
        own = {"critic": critic, "advantage": {"estimator": "gae"}}
    with_tokens(tmp_path / "model", 300)
    for size in (299, 304):
        with_tokens(tmp_path / "prm", size)
        (found,) = problems(config(**own))
        assert found.startswith(f"{role}.hf: found vocab_size {size} in ")
        assert "wanted 300 as in model.hf" in found
    with_tokens(tmp_path / "prm", 300)
    assert problems(config(**own)) == []


def test_evaluating_wants_one_vocabulary(config, tmp_path):
    knobs = {"sets": {"mine": tmp_path / "eval.jsonl"}, "max_response_length": 64, "samples": 4}
    with_tokens(tmp_path / "model", 300)
    for size, told in ((300, []), (299, ["evaluate.policy", "evaluate.prm", "evaluate.reference"])):
        with_tokens(tmp_path / "prm", size)
        other = dict.fromkeys(("policy", "prm", "reference"), tmp_path / "prm")
        lines = problems(config(evaluate=knobs | other), "evaluate", 1)
        assert [line.split(":")[0] for line in lines] == told


def test_vocabularies_may_differ_by_padding(config, tmp_path):
    own = {"prm": {"hf": tmp_path / "prm"}}
    with_tokens(tmp_path / "model", 300, "abc")
    for words, fits in (("abc", True), ("abd", False), ("abcd", False), (None, False)):
        (tmp_path / "prm" / "tokenizer.json").unlink(missing_ok=True)
        with_tokens(tmp_path / "prm", 304, words)
        assert (problems(config(**own)) == []) is fits, words


def test_an_outcome_only_run_needs_nothing_of_the_prm(config, tmp_path):
    broken = {"mini_batch_size": 7, "micro_batch_tokens": 1, "hf": tmp_path / "nowhere"}
    assert len(problems(config(prm=broken))) == 3
    assert problems(config(prm=broken, advantage={"process_weight": 0.0})) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"model_type": "gpt2"}',
            r"found model_type 'gpt2' .*supported: llama, mistral, qwen2, qwen3",
        ),
        ('{"model_type": "qwen2", "num_hidden_layers": 6}', "lacks num_attention_heads, num_key"),
        ("<html>", "is not JSON"),
    ],
)
def test_unusable_config_json(config, tmp_path, text, message):
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        check(config(), "train", None)


def test_a_file_is_no_checkpoint_directory(config, tmp_path):
    (found,) = problems(config(model={"hf": tmp_path / "train.jsonl"}))
    assert found.startswith("model.hf: no ")


def test_all_problems_are_reported_at_once(config, tmp_path):
    found = problems(
        config(
            megatron={TENSOR: 8, PIPELINE: 4},
            data={"train": tmp_path / "nowhere", "max_prompt_length": 100},
            rollout={"group_size": 1, "prompts_per_step": 100},
            filter={"min_accuracy": 0.5, "max_accuracy": 0.4},
        ),
        world_size=12,
    )
    knobs = [line.partition(":")[0] for line in found]
    assert knobs == [
        f"megatron.{TENSOR}, megatron.{PIPELINE}, megatron.context_parallel_size",
        f"megatron.{TENSOR}",  # attention heads
        f"megatron.{TENSOR}",  # key/value heads
        f"megatron.{PIPELINE}",
        "data.max_prompt_length, rollout.max_response_length",
        "data.train",
        "rollout.group_size",
        "filter.min_accuracy",
        "policy.mini_batch_size",
        "policy.micro_batch_tokens",
        "prm.mini_batch_size",
        "prm.micro_batch_tokens",
    ]


def test_fine_tuning_is_checked_by_its_own_table(config):
    wrong = {"sft": {"max_length": 300, "mini_batch_size": 6, "micro_batch_tokens": 299}}
    assert problems(config(**wrong), "train", 4) == []
    found = problems(config(**wrong), "sft", 4)
    assert [line.partition(":")[0] for line in found] == [
        "sft.max_length",
        "sft.mini_batch_size",
        "sft.micro_batch_tokens",
    ]
    (found,) = problems(config(sft={"data": None}), "sft")
    assert found.startswith("sft.data: missing")


def test_evaluation_needs_problems(config):
    (found,) = problems(config(data={"eval": None}), "evaluate")
    assert found.startswith("data.eval: missing")
    assert problems(config(data={"eval": None}), "train") == []


def test_a_set_that_is_not_there_says_which_file_to_bring(config, tmp_path):
    knobs = {"evaluate": {"sets": {"amc": tmp_path / "amc.jsonl", "mine": tmp_path / "m.jsonl"}}}
    knobs["evaluate"]["max_response_length"] = 64
    for command in ("evaluate", "train"):
        amc, mine = problems(config(**knobs), command, 1)
        assert amc.startswith(f"evaluate.sets.amc: no file {tmp_path}/amc.jsonl; AMC is not")
        assert "AI-MO/aimo-validation-amc" in amc
        assert '"answer": "142.0"' in amc
        assert mine.startswith(f"evaluate.sets.mine: no file {tmp_path}/m.jsonl; wanted jsonl")
    for path in knobs["evaluate"]["sets"].values():
        path.touch()
    assert problems(config(**knobs), "evaluate", 1) == []


def test_the_longest_limit_of_the_sets_must_have_room(config, tmp_path):
    """A model of 256 positions; the paper's limit of AMC is 4096 tokens, ours may be lower."""
    sets = {"amc": tmp_path / "eval.jsonl", "mine": tmp_path / "eval.jsonl"}
    for command in ("evaluate", "train"):
        (found,) = problems(config(evaluate={"sets": sets}), command, 1)
        assert found.startswith(
            "data.max_prompt_length, evaluate.max_response_length: found 56 + 4096 = 4152 tokens"
        )
        shorter = {"sets": sets, "max_response_length": 200}
        assert problems(config(evaluate=shorter), command, 1) == []
    # Alone, `evaluate` does not ask for room for training's own responses.
    alone = config(evaluate=shorter, rollout={"max_response_length": 300})
    assert problems(alone, "evaluate", 1) == []


def test_knobs_of_sets_that_do_not_go_together(config, tmp_path):
    def of(**knobs):
        return problems(config(evaluate={"max_response_length": 64, **knobs}), "evaluate", 1)

    sets = {"mine": tmp_path / "eval.jsonl"}
    assert [line.split(":")[0] for line in of(samples=4, prm=tmp_path / "prm")] == [
        "evaluate.samples",
        "evaluate.prm",
    ]
    (found,) = of(sets=sets, greedy=False)
    assert "nothing is asked" in found
    (found,) = of(sets=sets, samples=4, reference=tmp_path / "model")
    assert found.startswith("evaluate.reference: found without evaluate.prm")
    (found,) = of(sets=sets, samples=4, prm=tmp_path / "prm")
    assert found.startswith("evaluate.reference: missing")
    (found,) = of(sets=sets, samples=1, prm=tmp_path / "prm", reference=tmp_path / "model")
    assert found.startswith("evaluate.samples: found 1 with evaluate.prm")
    both = {"prm": tmp_path / "prm", "reference": tmp_path / "model", "samples": 4}
    assert of(sets=sets, **both) == []
    (found,) = of(sets=sets, **{**both, "prm": tmp_path / "none"})
    assert found.startswith(f"evaluate.prm: no directory {tmp_path}/none")
    (found,) = of(sets=sets, policy=tmp_path / "none")
    assert found.startswith(f"evaluate.policy: no directory {tmp_path}/none")
    step = tmp_path / "step_000001"
    (step / "critic").mkdir(parents=True)
    (step / "run.json").touch()
    (found,) = of(sets=sets, policy=step)
    assert found.startswith(f"evaluate.policy: found only critic of a run in {step}")


@pytest.mark.parametrize(
    ("made_with", "told"),
    [
        ({"prm": {"reference": "policy"}}, "to a policy that changed at every step"),
        ({"prm": {"forward": "frozen"}}, "its PRM came from elsewhere"),
        ({"prm": {"reference": "frozen", "forward": "single"}}, None),
        ({}, None),  # a run of before there was a choice
        (None, "is damaged"),
    ],
)
def test_a_run_names_its_prms_reference_only_if_that_was_its_start(
    config, tmp_path, made_with, told
):
    (tmp_path / "prm" / "run.json").write_text(json.dumps({"config": made_with}))
    knobs = {"sets": {"mine": tmp_path / "eval.jsonl"}, "max_response_length": 64, "samples": 4}
    ranked = {**knobs, "prm": tmp_path / "prm"}
    found = problems(config(evaluate=ranked), "evaluate", 1)
    if told is None:
        assert found == []
    else:
        assert found[0].startswith("evaluate.reference: missing, and ")
        assert told in found[0]
    named = {**ranked, "reference": tmp_path / "model"}
    assert problems(config(evaluate=named), "evaluate", 1) == []


def test_a_prm_ranks_at_the_scale_that_it_was_trained_with(config, tmp_path):
    (tmp_path / "prm" / "run.json").write_text(json.dumps({"config": {"prm": {"beta": 0.1}}}))
    knobs = {"sets": {"mine": tmp_path / "eval.jsonl"}, "max_response_length": 64, "samples": 4}
    ranked = {**knobs, "prm": tmp_path / "prm", "reference": tmp_path / "model"}
    (found,) = problems(config(evaluate=ranked), "evaluate", 1)
    assert found.startswith("prm.beta: found 0.05, but the PRM in")
    assert problems(config(evaluate=ranked, prm={"beta": 0.1}), "evaluate", 1) == []


def test_a_prm_that_ranks_is_split_as_megatron_says(config, tmp_path):
    knobs = {"sets": {"mine": tmp_path / "eval.jsonl"}, "max_response_length": 64, "samples": 4}
    ranked = {**knobs, "prm": tmp_path / "prm", "reference": tmp_path / "model"}
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}
    assert problems(config(megatron=sizes, evaluate=knobs), "evaluate", 4) == []
    (found,) = problems(config(megatron=sizes, evaluate=ranked), "evaluate", 4)
    assert "does not divide the run's 4 ranks" in found
    assert problems(config(megatron=sizes, evaluate=ranked), "evaluate", 6) == []
    long = {**ranked, "max_response_length": 198}
    assert problems(config(evaluate=long, prm={"micro_batch_tokens": 254}), "evaluate", 1) == []
    (found,) = problems(config(evaluate=long, prm={"micro_batch_tokens": 253}), "evaluate", 1)
    assert found.startswith("prm.micro_batch_tokens: found 253")
    assert "= 254 tokens" in found


def test_evaluation_builds_no_megatron_model(config):
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}
    assert problems(config(megatron=sizes), "evaluate", 1) == []


def test_advantages_of_nothing_are_refused(config):
    nothing = {"process_weight": 0.0, "outcome_weight": 0.0}
    (found,) = problems(config(advantage=nothing), "train")
    assert found.startswith("advantage.process_weight, advantage.outcome_weight: found 0 for both")


def test_a_cosine_needs_steps_after_the_warm_up(config):
    schedule = {"schedule": "cosine", "warmup_steps": 100}
    (found,) = problems(config(run={"steps": 100}, policy=schedule), "train")
    assert found.startswith("policy.warmup_steps: found 100, wanted fewer than run.steps = 100")
    constant = {"schedule": "constant", "warmup_steps": 100}
    assert problems(config(run={"steps": 100}, policy=constant), "train") == []
