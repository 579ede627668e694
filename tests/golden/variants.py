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
