"""Expected values of PRIME's formulae, token by token in plain Python; imports nothing of ours.

prime_vectors.json holds `inputs` (2 prompts x 4 responses, T = 7, garbage on padding) and
`expected`, which is computed here from the inputs. Row i has `lengths[i]` response tokens, rows of
one prompt are contiguous, and every token value is 0 on padding.

    python tests/golden/make_prime_vectors.py [FILE]            write the expected values into FILE
    python tests/golden/make_prime_vectors.py --check [FILE]    exit 1 if FILE holds other ones
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

FILE = Path(__file__).with_name("prime_vectors.json")


class Batch:
    """The inputs, and walks over their rows and tokens."""

    def __init__(self, inputs):
        self.prm, self.ref = inputs["logp_phi"], inputs["logp_ref"]
        self.old, self.new = inputs["old_logp"], inputs["new_logp"]
        self.values = inputs["values"]
        self.outcomes, self.beta, self.lengths = inputs["acc"], inputs["beta"], inputs["lengths"]
        self.rows, self.columns, self.k = range(inputs["N"]), inputs["T"], inputs["K"]

    def tokens(self, value):
        """A table of value(row, token), 0 on padding."""
        return [
            [value(i, t) if t < self.lengths[i] else 0.0 for t in range(self.columns)]
            for i in self.rows
        ]

    def flat(self, table):
        return [table[i][t] for i in self.rows for t in range(self.lengths[i])]

    def group(self, i):
        start = i - i % self.k
        return range(start, start + self.k)

    def others(self, i):
        return [j for j in self.group(i) if j != i]


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def deviation(values, eps=0.0):
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) + eps)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def cross_entropy(logit, label):
    """-(label log sigmoid(logit) + (1 - label) log sigmoid(-logit)) without overflow."""
    return max(logit, 0.0) - label * logit + math.log1p(math.exp(-abs(logit)))


def implicit(batch, beta):
    return batch.tokens(lambda i, t: beta * (batch.prm[i][t] - batch.ref[i][t]))


def returns_to_go(batch, rewards, gamma=1.0):
    return batch.tokens(
        lambda i, t: math.fsum(gamma ** (s - t) * rewards[i][s] for s in range(t, batch.lengths[i]))
    )


def scaled(table, factor):
    return [[factor * x for x in row] for row in table]


def normed(batch, rewards):
    """Process rewards over the largest absolute return-to-go."""
    largest = max(abs(x) for x in batch.flat(returns_to_go(batch, rewards)))
    return scaled(rewards, 1 / (largest + 1e-6))


def process_advantage(batch, rewards, baseline, gamma=1.0):
    means = [math.fsum(rewards[i][: batch.lengths[i]]) / batch.lengths[i] for i in batch.rows]
    k = batch.k

    def centred(i, t):
        if baseline == "paper":
            return rewards[i][t] - mean(means[j] for j in batch.others(i))
        return k / (k - 1) * rewards[i][t] - math.fsum(means[j] for j in batch.group(i)) / (k - 1)

    return returns_to_go(batch, batch.tokens(centred), gamma)


def outcome_advantage(batch):
    return [
        batch.outcomes[i] - mean(batch.outcomes[j] for j in batch.others(i)) for i in batch.rows
    ]


def whitened(batch, table):
    values = batch.flat(table)
    centre, spread = mean(values), deviation(values, eps=1e-8)
    return batch.tokens(lambda i, t: (table[i][t] - centre) / spread)


def advantages(batch):
    """Every combination of the options that the tests ask for, by the names of the tests' table."""
    beta_rewards, raw_rewards = implicit(batch, batch.beta), implicit(batch, 1.0)
    outcome = outcome_advantage(batch)

    def plus_outcome(process, weight=1.0):
        return batch.tokens(lambda i, t: process[i][t] + weight * outcome[i])

    values = {"rloo.outcome": outcome}
    for name, baseline in (("loo_lengthmean", "paper"), ("code", "released")):
        for gamma in (1.0, 0.9):
            process = process_advantage(batch, beta_rewards, baseline, gamma)
            values[f"rloo.{name}.process.g{gamma}"] = process
            values[f"rloo.{name}.advantage.g{gamma}"] = plus_outcome(process)
    released = plus_outcome(process_advantage(batch, normed(batch, raw_rewards), "released"))
    paper = plus_outcome(process_advantage(batch, normed(batch, raw_rewards), "paper"))
    values["rloo.released.returns"] = released
    values["rloo.released.advantage"] = whitened(batch, released)
    values["rloo.paper_recommended.advantage"] = whitened(batch, paper)
    values["rloo.outcome_only.advantage"] = whitened(batch, batch.tokens(lambda i, t: outcome[i]))

    # A reward of 0 on the last token and both parts five times as heavy.
    cut = batch.tokens(lambda i, t: beta_rewards[i][t] if t < batch.lengths[i] - 1 else 0.0)
    process = process_advantage(batch, normed(batch, cut), "released")
    values["implicit.port_token"] = cut
    values["rloo.port.returns"] = plus_outcome(scaled(process, 5.0), weight=5.0)
    return values


def prm(batch):
    """Rewards, cross-entropy with its gradient, and the accuracy in ranking pairs."""
    rewards = implicit(batch, batch.beta)
    sums = [math.fsum(row) for row in rewards]
    losses = [cross_entropy(sums[i], batch.outcomes[i]) for i in batch.rows]
    half = len(losses) // 2
    logits = (-200.0, -40.0, 0.0, 40.0, 200.0)
    accuracies = pair_accuracies(batch, sums)
    return {
        "implicit.token_reward": rewards,
        "implicit.token_logratio": implicit(batch, 1.0),
        "implicit.sequence_reward": sums,
        "ce.loss": mean(losses),
        "ce.per_sample": losses,
        "ce.minibatch_order": [mean(losses[:half]), mean(losses[half:])],
        "ce.grad_logp_phi": batch.tokens(
            lambda i, t: batch.beta * (sigmoid(sums[i]) - batch.outcomes[i]) / len(batch.rows)
        ),
        "ce.saturation": [
            [z, cross_entropy(z, 1.0), cross_entropy(z, 0.0), -sigmoid(-z), sigmoid(z)]
            for z in logits
        ],
        "metric.pair_accuracy": {"mean": mean(accuracies), "per_prompt": accuracies},
        "metric.pair_accuracy_at_init": mean(pair_accuracies(batch, [0.0] * len(sums))),
    }


def prm_losses(batch):
    """Each loss of sequence rewards R, and dL/dR, at the inputs' R and at -20 times it."""
    sums = [math.fsum(row) for row in implicit(batch, batch.beta)]
    found = {}
    for factor in (1, -20):
        rewards = [factor * x for x in sums]
        for name, (loss, slopes) in losses_of(batch, rewards, batch.outcomes).items():
            found[f"prm_loss.{name}.at_{factor}"] = {"loss": loss, "slopes": slopes}
    binary = [float(o == 1) for o in batch.outcomes]
    of_pairs = losses_of(batch, sums, binary)
    found["offline_losses"] = {name: of_pairs[name][0] for name in ("dpo", "nca")}
    return found


def losses_of(batch, rewards, outcomes):
    """Loss and slopes by name."""
    n = len(rewards)
    right = [float(o == 1) for o in outcomes]
    pairs = [(a, b) for a in batch.rows for b in batch.group(a) if outcomes[a] > outcomes[b]]
    dpo, nca = [0.0] * n, [0.0] * n
    for a, b in pairs:
        wrong = sigmoid(rewards[b] - rewards[a]) / len(pairs)
        dpo[a] -= wrong
        dpo[b] += wrong
        nca[a] += (0.5 * sigmoid(rewards[a]) - sigmoid(-rewards[a])) / len(pairs)
        nca[b] += 0.5 * sigmoid(rewards[b]) / len(pairs)
    of_right = max(0.0, mean(r for r, y in zip(rewards, right, strict=True) if y))
    of_wrong = max(0.0, mean(r for r, y in zip(rewards, right, strict=True) if not y))
    chances = [
        sigmoid(r - of_wrong) if y else sigmoid(of_right - r)
        for r, y in zip(rewards, right, strict=True)
    ]

    def surprise(x):
        return cross_entropy(x, 1.0)

    return {
        "ce": (
            mean(map(cross_entropy, rewards, outcomes)),
            [(sigmoid(r) - y) / n for r, y in zip(rewards, outcomes, strict=True)],
        ),
        "ce_hard": (
            mean(map(cross_entropy, rewards, right)),
            [(sigmoid(r) - y) / n for r, y in zip(rewards, right, strict=True)],
        ),
        "dpo": (mean(surprise(rewards[a] - rewards[b]) for a, b in pairs), dpo),
        "nca": (
            mean(
                surprise(rewards[a]) + (surprise(-rewards[a]) + surprise(-rewards[b])) / 2
                for a, b in pairs
            ),
            nca,
        ),
        "kto": (
            mean(1 - p for p in chances),
            [(1 - 2 * y) * p * (1 - p) / n for p, y in zip(chances, right, strict=True)],
        ),
    }


def pair_accuracies(batch, sums):
    """Of each group: weighted by the outcome difference, a tie in sums meaning "not greater"."""
    found = []
    for start in batch.rows[:: batch.k]:
        pairs = [(a, b) for a in batch.group(start) for b in batch.group(start) if a < b]
        weights = [abs(batch.outcomes[a] - batch.outcomes[b]) for a, b in pairs]
        right = math.fsum(
            weight
            for (a, b), weight in zip(pairs, weights, strict=True)
            if (sums[a] > sums[b]) == (batch.outcomes[a] > batch.outcomes[b])
        )
        found.append(right / math.fsum(weights) if any(weights) else 0.5)
    return found


def policy(batch, weights, clip=0.2):
    """The clipped surrogate of advantages `weights`, its gradients and its metrics."""

    def ratio(i, t):
        return math.exp(batch.new[i][t] - batch.old[i][t])

    def is_clipped(i, t):
        outside = ratio(i, t) > 1 + clip if weights[i][t] > 0 else ratio(i, t) < 1 - clip
        return outside and weights[i][t] != 0

    def loss(i, t):
        bound = 1 + clip if weights[i][t] > 0 else 1 - clip
        return -weights[i][t] * (bound if is_clipped(i, t) else ratio(i, t))

    def slope(i, t):
        return 0.0 if is_clipped(i, t) else -weights[i][t] * ratio(i, t)

    losses, slopes = batch.tokens(loss), batch.tokens(slope)
    tokens, rows, length = sum(batch.lengths), len(batch.rows), batch.lengths
    row_means = [math.fsum(losses[i]) / length[i] for i in batch.rows]
    pairs = [
        (math.fsum(losses[i] + losses[i + 1]), length[i] + length[i + 1]) for i in batch.rows[::2]
    ]
    return {
        "ppo.loss.token_mean": mean(batch.flat(losses)),
        "ppo.loss.seq_mean_token_mean": mean(row_means),
        "ppo.loss.microbatch2": mean(total / count for total, count in pairs),
        "ppo.grad_new_logp.token_mean": scaled(slopes, 1 / tokens),
        "ppo.grad_new_logp.seq_mean": batch.tokens(lambda i, t: slopes[i][t] / (rows * length[i])),
        "ppo.clipfrac": mean(batch.flat(batch.tokens(lambda i, t: float(is_clipped(i, t))))),
        "ppo.approx_kl": -mean(math.log(r) for r in batch.flat(batch.tokens(ratio))),
        "ppo.ratio_max": max(batch.flat(batch.tokens(ratio))),
    }


def mismatch(batch):
    """`new_logp` stands in for the rollout engine's log-probs."""
    gaps = batch.flat(batch.tokens(lambda i, t: batch.old[i][t] - batch.new[i][t]))
    return {
        "mismatch.kl_k3": mean(math.exp(d) - 1 - d for d in gaps),
        "mismatch.max": max(abs(d) for d in gaps),
    }


def returns(batch, gamma=0.9):
    """Spread of the process returns, discounted by 0.9, and of the outcome each token leads to."""
    process = returns_to_go(batch, implicit(batch, batch.beta), gamma)
    tables = {"process": process, "outcome": batch.tokens(lambda i, t: batch.outcomes[i])}
    figures = {}
    for name, table in tables.items():
        values = batch.flat(table)
        figures[f"{name}_return_mean"] = mean(values)
        figures[f"{name}_return_std"] = deviation(values)
        figures[f"{name}_return_abs_max"] = max(abs(x) for x in values)
    return {"returns.g0.9": figures}


def windows():
    """Which groups a window of [0.2, 0.8] keeps, in exact arithmetic on tenths."""
    groups = [[0] * 4, [10, 0, 0, 0], [10, 10, 10, 0], [10] * 4, [10, 0, 0, 0, 0]]
    groups += [[10, 10, 10, 10, 0], [8] * 4, [9, 7, 9, 7], [9, 7, 9, 8], [2] * 4, [2, 2, 2, 1]]
    kept = [2 * len(tenths) <= sum(tenths) <= 8 * len(tenths) for tenths in groups]
    return {
        "filter.table": [
            {"acc": [t / 10 for t in tenths], "keep_inclusive": keep}
            for tenths, keep in zip(groups, kept, strict=True)
        ]
    }


def expected(inputs):
    from critics import critics  # beside this file
    from variants import estimators, policy_losses

    batch = Batch(inputs)
    values = prm(batch) | prm_losses(batch) | advantages(batch) | mismatch(batch) | returns(batch)
    values |= windows() | estimators(batch) | critics(batch)
    weights = values["rloo.released.advantage"]
    return values | policy(batch, weights) | policy_losses(batch, weights)


def differs(found, wanted, tolerance=1e-12):
    """The first place where two trees of numbers differ, or nothing."""
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        pairs = [(key, found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = [(str(i), found[i], wanted[i]) for i in range(len(wanted))]
    elif isinstance(wanted, dict | list) or isinstance(found, dict | list):
        return "(other keys or lengths)"
    else:
        return "" if abs(found - wanted) <= tolerance else f": {found}, computed {wanted}"
    places = ((key, differs(a, b, tolerance)) for key, a, b in pairs)
    return next((f"/{key}{place}" for key, place in places if place), "")


def main(arguments):
    check = "--check" in arguments
    paths = [Path(argument) for argument in arguments if argument != "--check"]
    path = paths[0] if paths else FILE
    content = json.loads(path.read_text())
    wanted = json.loads(json.dumps(expected(content["inputs"])))
    if check:
        place = differs(content["expected"], wanted)
        print(f"{path}{place}" if place else f"{path} agrees with its generator")
        return 1 if place else 0
    path.write_text(page({"inputs": content["inputs"], "expected": wanted}))
    return 0


def page(sections):
    """JSON with one named value per line."""
    blocks = [
        f' "{name}": {{\n'
        + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in values.items())
        + "\n }"
        for name, values in sections.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
