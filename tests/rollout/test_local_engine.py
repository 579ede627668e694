from __future__ import annotations

import json

import pytest
import torch
from given import Given

from megatron_prime.rollout.local_engine import end_of_sequence_ids
from megatron_prime.types import Prompt, Sampling

SAMPLING = Sampling(samples=4, temperature=1.0, max_tokens=16, seed=9)


def by_prompt(groups):
    return {group.prompt.prompt_id: group for group in groups}


def assert_same_rollouts(found, wanted):
    assert found.keys() == wanted.keys()
    for prompt_id, group in found.items():
        for one, other in zip(group.rollouts, wanted[prompt_id].rollouts, strict=True):
            assert one.response_ids == other.response_ids
            assert (one.finish_reason, one.text) == (other.finish_reason, other.text)
            torch.testing.assert_close(
                one.rollout_logprobs, other.rollout_logprobs, rtol=0, atol=1e-5
            )


def test_groups_carry_prompt_version_reason_and_text(engine, prompts):
    groups = list(engine.generate(prompts, SAMPLING))
    assert [group.prompt for group in groups] == prompts
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len(rollouts) == 4 * len(prompts)
    assert {rollout.policy_version for rollout in rollouts} == {3}
    assert len({rollout.response_ids for rollout in rollouts}) > len(prompts), "samples differ"
    for rollout in rollouts:
        ended = rollout.response_ids[-1] == 1
        assert rollout.finish_reason == ("stop" if ended else "length")
        visible = rollout.response_ids[:-1] if ended else rollout.response_ids
        assert rollout.text == "".join(chr(32 + token) for token in visible)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6, 9])
def test_rollouts_do_not_depend_on_the_batch_size(make_engine, model, engine, prompts, batch_size):
    small = make_engine(batch_size=batch_size)
    small.load_weights(Given(model.named_parameters()), version=3)
    assert_same_rollouts(
        by_prompt(small.generate(prompts, SAMPLING)), by_prompt(engine.generate(prompts, SAMPLING))
    )


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_rollouts_do_not_depend_on_the_number_of_ranks(
    make_engine, model, engine, prompts, world_size
):
    shares = []
    for rank in range(world_size):
        one = make_engine(rank, world_size)
        one.load_weights(Given(model.named_parameters()), version=3)
        shares.append(by_prompt(one.generate(prompts, SAMPLING)))
    assert [list(share) for share in shares] == [
        [prompt.prompt_id for prompt in prompts[rank::world_size]] for rank in range(world_size)
    ]
    together = {prompt_id: group for share in shares for prompt_id, group in share.items()}
    assert_same_rollouts(together, by_prompt(engine.generate(prompts, SAMPLING)))


@pytest.mark.parametrize("batch_size", [4, 12, 64])
def test_the_timeline_hears_how_many_responses_have_not_ended(
    make_engine, model, prompts, batch_size
):
    """After each token: those that are longer, by the rollouts themselves."""
    told = []

    class Heard:
        def generating(self, slots):
            told.append(("slots", slots))

        def at_work(self, slots):
            told.append(slots)

        def generated(self):
            told.append("generated")

    engine = make_engine(batch_size=batch_size)
    engine.timeline = Heard()
    engine.load_weights(Given(model.named_parameters()), version=3)
    groups = list(engine.generate(prompts, SAMPLING))
    lengths = [len(rollout.response_ids) for group in groups for rollout in group.rollouts]
    batches = [lengths[n : n + batch_size] for n in range(0, len(lengths), batch_size)]
    wanted = [("slots", min(batch_size, len(lengths)))]
    for batch in batches:
        going = [sum(n > t for n in batch) for t in range(1, SAMPLING.max_tokens)]
        wanted += [len(batch), *filter(None, going)]
    assert told == [*wanted, "generated", "generated"]
    assert len(set(lengths)) > 2


def test_a_group_comes_as_soon_as_its_batch_is_done(make_engine, model, prompts, monkeypatch):
    engine = make_engine(batch_size=8)
    engine.load_weights(Given(model.named_parameters()), version=0)
    done = []
    rollouts = engine._rollouts

    def counted(requests, sampling):
        done.append(len(requests))
        return rollouts(requests, sampling)

    monkeypatch.setattr(engine, "_rollouts", counted)
    groups = engine.generate(prompts, SAMPLING)
    assert done == []
    next(groups), next(groups)
    assert done == [8], "two groups of four fill the first batch of eight"
    next(groups)
    assert done == [8, 8]


def test_new_weights_replace_the_old_ones(engine, model, prompts):
    before = by_prompt(engine.generate(prompts, SAMPLING))
    engine.load_weights(Given([(n, 2 * p) for n, p in model.named_parameters()]), version=4)
    after = by_prompt(engine.generate(prompts, SAMPLING))
    assert {r.policy_version for g in after.values() for r in g.rollouts} == {4}
    assert any(after[i].rollouts != before[i].rollouts for i in before)
    engine.load_weights(Given(model.named_parameters()), version=3)
    assert_same_rollouts(by_prompt(engine.generate(prompts, SAMPLING)), before)


def test_bf16_engine_takes_fp32_weights(make_engine, model, prompts):
    engine = make_engine(dtype="bf16")
    engine.load_weights(Given(model.named_parameters()), version=0)
    weight = engine.model.model.embed_tokens.weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight, model.model.embed_tokens.weight.to(torch.bfloat16))
    assert len(list(engine.generate(prompts, SAMPLING))) == len(prompts)


def test_samples_nothing_before_weights_came(make_engine, prompts):
    engine = make_engine()
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="call load_weights first"):
        engine.generate(prompts, SAMPLING)


def test_a_tied_output_layer_may_come_under_its_own_name(make_engine, model, tied, prompts):
    everything = list(model.named_parameters(remove_duplicate=False))
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    engine = make_engine()
    engine.load_weights(Given(everything), version=0)
    assert engine.version == 0
    other = [(n, p + 1 if n == "lm_head.weight" else p) for n, p in everything]
    if tied:
        with pytest.raises(ValueError, match=r"lm_head.weight came twice with different values"):
            engine.load_weights(Given(other), version=1)
    else:
        engine.load_weights(Given(other), version=1)
        assert not torch.equal(engine.model.lm_head.weight, everything[-1][1])


def without(weights, name):
    return [(key, tensor) for key, tensor in weights if key != name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: without(w, "model.norm.weight"), r"1 of \d+ parameters .*model\.norm\.weight"),
        (lambda w: w[:1], r"parameters did not arrive: .* …"),
        (lambda w: [*w, ("model.extra", torch.ones(1))], "no parameter model.extra"),
        (
            lambda w: [*without(w, "model.norm.weight"), ("model.norm.weight", torch.ones(5))],
            r"model\.norm\.weight has shape \[5\], wanted \[32\]",
        ),
    ],
    ids=["missing", "many missing", "surplus", "shape"],
)
def test_wrong_weights_are_refused_and_leave_no_version(engine, model, prompts, spoil, message):
    with pytest.raises(ValueError, match=message):
        engine.load_weights(Given(spoil(list(model.named_parameters()))), version=4)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(prompts, SAMPLING)


def test_an_interrupted_load_leaves_no_version(engine, model, prompts):
    def broken():
        yield from list(model.named_parameters())[:2]
        raise OSError("the link is down")

    with pytest.raises(OSError, match="link"):
        engine.load_weights(Given(broken()), version=4)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(prompts, SAMPLING)


def test_a_prompt_without_tokens_is_refused(engine):
    with pytest.raises(ValueError, match="prompt 5 has no tokens"):
        engine.generate([Prompt(5, (), "", "math", "test")], SAMPLING)


def test_no_prompts_no_groups(engine):
    assert list(engine.generate([], SAMPLING)) == []


class Speechless:
    eos_token_id = None


@pytest.mark.parametrize(("listed", "wanted"), [([7, 2], (2, 7)), (7, (7,))])
def test_end_tokens_come_from_generation_config_too(tmp_path, listed, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert end_of_sequence_ids(Speechless(), tmp_path) == wanted


def test_a_model_that_never_stops_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no response would ever stop"):
        end_of_sequence_ids(Speechless(), tmp_path)


class After:
    """A tally that is reached after it was asked so often."""

    def __init__(self, asked):
        self.asked = asked

    def add(self, group): ...

    def reached(self):
        self.asked -= 1
        return self.asked < 0


@pytest.mark.parametrize(
    ("batch_size", "batches", "groups"),
    [(8, 2, 4), (8, 0, 0), (8, 99, 7), (3, 2, 1), (3, 3, 2)],  # batches of 3: a group spans two
)
def test_no_batch_begins_when_there_is_enough(
    make_engine, model, engine, prompts, batch_size, batches, groups
):
    small = make_engine(batch_size=batch_size)
    small.load_weights(Given(model.named_parameters()), version=3)
    found = list(small.generate(prompts, SAMPLING, After(batches)))
    assert [group.prompt for group in found] == prompts[:groups]
    whole = by_prompt(engine.generate(prompts[:groups], SAMPLING))
    assert_same_rollouts(by_prompt(found), whole)
    assert small.take_metrics() == {}
