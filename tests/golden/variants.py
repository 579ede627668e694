"""Expected values of the options beside PRIME's own choices, token by token in plain Python.

A part of make_prime_vectors.py, whose inputs and conventions these values share: `batch` is its
Batch. Steps end where STEP_ENDS says, and at the last token of each response.
"""

from __future__ import annotations

import math

# Ends of steps by row; the place of the last token may be among them or not.
STEP_ENDS = [[1, 4], [0], [2, 3], [], [1], [], [0], [1, 3]]


def estimators(batch):
    """Advantages of each estimator with process rewards in beta units, neither scaled nor white."""
    rewards = batch.tokens(lambda i, t: batch.beta * (batch.prm[i][t] - batch.ref[i][t]))
    outcome, lengths = batch.outcomes, batch.lengths
    everywhere = [list(range(length)) for length in lengths]
    at_steps = [sorted({*STEP_ENDS[i], lengths[i] - 1}) for i in batch.rows]
    at_the_end = [[length - 1] for length in lengths]
    values = {
        "steps.ends": batch.tokens(lambda i, t: float(t in STEP_ENDS[i])),
        "grpo.outcome.ddof1": in_spreads(batch, outcome),
        "grpo.outcome.centred": less_the_mean(batch, outcome),
        "reinforce.outcome_only": batch.tokens(lambda i, t: outcome[i]),
        "prime_as_value.advantage": values_taken_off(batch, rewards),
        "implicit.step_granularity": moved(batch, rewards, at_steps),
        "implicit.whole_granularity": moved(batch, rewards, at_the_end),
    }
    for gamma in (1.0, 0.9):
        values[f"reinforce.advantage.g{gamma}"] = reinforce(batch, rewards, everywhere, gamma)
        values[f"grpo.process.ddof1.g{gamma}"] = grpo(batch, rewards, everywhere, gamma)
        values[f"grpo.advantage.ddof1.g{gamma}"] = grpo(batch, rewards, everywhere, gamma, 1.0)
    for name, places in (("step", at_steps), ("whole", at_the_end)):
        there = moved(batch, rewards, places)
        values[f"rloo.{name}.paper.g0.9"] = rloo(batch, there, places, 0.9)
        values[f"rloo.{name}.released.g0.9"] = released(batch, there, 0.9)
        values[f"grpo.{name}.g0.9"] = grpo(batch, there, places, 0.9, 1.0)
        values[f"reinforce.{name}.g0.9"] = reinforce(batch, there, places, 0.9)
    values["prime_as_value.step"] = values_taken_off(batch, moved(batch, rewards, at_steps))
    return values


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def spread(values):
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def in_spreads(batch, values):
    """(value - mean of its group) / (deviation of its group + 1e-6)."""
    groups = [[values[j] for j in batch.group(i)] for i in batch.rows]
    return [
        (values[i] - mean(group)) / (spread(group) + 1e-6)
        for i, group in zip(batch.rows, groups, strict=True)
    ]


def less_the_mean(batch, values):
    return [values[i] - mean(values[j] for j in batch.group(i)) for i in batch.rows]


def moved(batch, rewards, places):
    """Rewards added up at the next of each row's places."""
    table = [[0.0] * batch.columns for _ in batch.rows]
    for i in batch.rows:
        before = -1
        for place in places[i]:
            table[i][place] = math.fsum(rewards[i][before + 1 : place + 1])
            before = place
    return table


def credited(batch, terms, places, gamma, outcomes):
    """Outcome plus the discounted sum of `terms(i, s)` over the places from the token on."""
    return batch.tokens(
        lambda i, t: (
            outcomes[i] + math.fsum(gamma ** (s - t) * terms(i, s) for s in places[i] if s >= t)
        )
    )


def means_of(batch, rewards, places):
    return [mean(rewards[i][s] for s in places[i]) for i in batch.rows]


def reinforce(batch, rewards, places, gamma):
    return credited(batch, lambda i, s: rewards[i][s], places, gamma, batch.outcomes)


def grpo(batch, rewards, places, gamma, outcome_weight=0.0):
    means = means_of(batch, rewards, places)
    groups = [[means[j] for j in batch.group(i)] for i in batch.rows]

    def term(i, s):
        return (rewards[i][s] - mean(groups[i])) / (spread(groups[i]) + 1e-6)

    outcomes = [outcome_weight * x for x in in_spreads(batch, batch.outcomes)]
    return credited(batch, term, places, gamma, outcomes)


def rloo(batch, rewards, places, gamma):
    means = means_of(batch, rewards, places)

    def term(i, s):
        return rewards[i][s] - mean(means[j] for j in batch.others(i))

    return credited(batch, term, places, gamma, left_out(batch))


def released(batch, rewards, gamma):
    """Means and baseline over all tokens, wherever the rewards stand."""
    everywhere = [list(range(length)) for length in batch.lengths]
    means = means_of(batch, rewards, everywhere)
    k = batch.k

    def term(i, s):
        return (k * rewards[i][s] - math.fsum(means[j] for j in batch.group(i))) / (k - 1)

    return credited(batch, term, everywhere, gamma, left_out(batch))


def left_out(batch):
    return [
        batch.outcomes[i] - mean(batch.outcomes[j] for j in batch.others(i)) for i in batch.rows
    ]


def values_taken_off(batch, rewards):
    """Outcome less the sum of the rewards before the token."""
    return batch.tokens(lambda i, t: batch.outcomes[i] - math.fsum(rewards[i][:t]))


def policy_losses(batch, weights):
    """The surrogate with other ends of advantages `weights`; KL of `new_logp` from `logp_ref`."""
    values = {}
    for name, low, high, dual in (
        ("asymmetric", 0.2, 0.05, None),
        ("dual", 0.2, 0.2, 1.1),
        ("asymmetric_dual", 0.3, 0.1, 1.15),
    ):
        found = batch.tokens(
            lambda i, t, ends=(low, high, dual): (
                surrogate(math.exp(batch.new[i][t] - batch.old[i][t]), weights[i][t], *ends)
                if t < batch.lengths[i]
                else 0.0
            )
        )
        pairs = [found[i][t] for i in batch.rows for t in range(batch.lengths[i])]
        values[f"ppo.{name}.loss.token_mean"] = mean(loss for loss, _ in pairs)
        slopes = batch.tokens(lambda i, t, found=found: found[i][t][1] / sum(batch.lengths))
        values[f"ppo.{name}.grad_new_logp.token_mean"] = slopes
        values[f"ppo.{name}.clipfrac"] = mean(float(slope == 0) for _, slope in pairs)
    for name in ("k1", "k2", "k3"):
        found = batch.tokens(
            lambda i, t, name=name: penalty(name, batch.new[i][t], batch.ref[i][t], batch.old[i][t])
        )
        values[f"kl.{name}"] = batch.tokens(lambda i, t, found=found: found[i][t][0])
        values[f"kl.{name}.slope"] = batch.tokens(lambda i, t, found=found: found[i][t][1])
    return values


def surrogate(ratio, weight, low, high, dual):
    """Loss and slope in the log of the ratio, case by case."""
    if weight >= 0:
        return (-weight * (1 + high), 0.0) if ratio > 1 + high else (-weight * ratio,) * 2
    if ratio < 1 - low:
        return -weight * (1 - low), 0.0
    if dual is not None and ratio > dual:
        return -weight * dual, 0.0
    return (-weight * ratio,) * 2


def penalty(name, new, ref, old):
    """Estimate and slope in the new log-prob."""
    d, ratio = new - ref, math.exp(new - old)
    return {
        "k1": (ratio * d, ratio * (d + 1)),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[name]
