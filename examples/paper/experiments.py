"""The paper's experiments as arms: what each changes of prime.toml, and which figure it is for.

An arm is a name, its knobs and the label of its curve. Arms with the same name and configuration
are one run: default PRIME and default RLOO are made once for all figures.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """A configuration: prime.toml with some knobs changed."""

    name: str
    label: str
    knobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Experiment:
    """A figure of the paper, or what it depends on."""

    figure: str
    title: str
    claim: str  # the paper's
    baseline: Arm  # whose final reward the others are measured by
    arms: tuple[Arm, ...]  # the others
    seeds: int = 3
    prm: bool = False  # draw the PRM's pair accuracy as well

    @property
    def heading(self) -> str:
        """What the paper calls it, if it is the paper's."""
        return f"Figure {self.figure}" if self.figure.isdigit() else self.figure.capitalize()

    @property
    def file_name(self) -> str:
        """Of its picture and table, without the ending."""
        return f"figure_{self.figure:>02}" if self.figure.isdigit() else self.figure

    @property
    def all_arms(self) -> tuple[Arm, ...]:
        """The baseline first."""
        return (self.baseline, *self.arms)


def outcome_only(arm: Arm, name: str, label: str) -> Arm:
    """The same without process rewards, and so without a PRM."""
    return Arm(name, label, (*arm.knobs, "--advantage.process_weight=0"))


def estimator(name: str, *knobs: str) -> Arm:
    """PRIME with another estimator."""
    return Arm(
        f"{name}_prime", f"{name.upper()} with PRIME", (f"--advantage.estimator={name}", *knobs)
    )


PRIME = Arm("prime", "PRIME")
RLOO = outcome_only(PRIME, "rloo", "RLOO, outcome only")
UNFILTERED = Arm(
    "rloo_unfiltered",
    "RLOO, no prompt filter",
    (*RLOO.knobs, "--filter.min_accuracy=0", "--filter.max_accuracy=1"),
)
OFFLINE_INIT = Arm("offline_init", "offline PRM, trained on", ("--prm.hf={offline_prm}",))
OFFLINE = Arm(
    "offline_prm", "offline PRM, frozen", ("--prm.hf={offline_prm}", "--prm.forward=frozen")
)
POLICY_REFERENCE = Arm(
    "policy_reference", "PRIME, policy as reference", ("--prm.reference=policy",)
)
DOUBLE = Arm("double", "PRIME, double forward", ("--prm.forward=double",))
REINFORCE_PRIME = estimator("reinforce")
REINFORCE = outcome_only(REINFORCE_PRIME, "reinforce", "REINFORCE")
GRPO_PRIME = estimator("grpo")
GRPO = outcome_only(GRPO_PRIME, "grpo", "GRPO")
PPO_PRIME = Arm(  # the critic learns as the PRM does
    "ppo_prime",
    "PPO with PRIME",
    (
        "--advantage.estimator=gae",
        "--critic.lr=1e-3",
        "--critic.mini_batch_size=64",
        "--critic.micro_batch_tokens=4096",
    ),
)
PPO = outcome_only(PPO_PRIME, "ppo", "PPO")
AS_VALUE = Arm("prime_value", "PRIME as value model", ("--advantage.estimator=prime_value",))
# Of group_size 8, as many responses a step.
OF_EIGHT = (
    "--rollout.group_size=8",
    "--rollout.prompts_per_step=8",
    "--rollout.prompts_per_round=20",
)
PRIME_KNOBS = (
    Arm("prime_beta", "PRIME, β 0.05", ("--prm.beta=0.05",)),
    Arm("prime_slow_prm", "PRIME, PRM at 2e-4", ("--prm.lr=2e-4",)),
    Arm("prime_dpo", "PRIME, PRM by DPO", ("--prm.loss=dpo",)),
    Arm("prime_raw", "PRIME, rewards not normalised", ("--advantage.process_norm=none",)),
    Arm("prime_gamma", "PRIME, γ 0", ("--advantage.gamma=0",)),
    Arm("prime_paper_preset", 'PRIME, preset = "paper"', ("--preset=paper",)),
)
RLOO_OF_EIGHT = Arm("rloo_eight", "RLOO, 8 × 8", (*RLOO.knobs, *OF_EIGHT))
PRIME_OF_EIGHT = Arm("prime_eight", "PRIME, 8 × 8", OF_EIGHT)


def at_rate(arm: Arm, rate: str) -> Arm:
    """The arm with another learning rate of the policy; the PRM's is five times that."""
    knobs = (*arm.knobs, f"--policy.lr={rate}", f"--prm.lr={5 * float(rate):g}")
    return Arm(f"{arm.name}_{rate}", f"{arm.label}, lr {rate}", knobs)


EXPERIMENTS = {
    "3": Experiment(
        "3",
        "Online prompt filter",
        "the filter lowers the variance of the training reward a lot",
        RLOO,
        (UNFILTERED,),
    ),
    "4": Experiment(
        "4",
        "PRIME against outcome-only RLOO",
        "PRIME reaches RLOO's final reward in 40 % of its steps (2.5×) and ends 6.9 % higher",
        RLOO,
        (PRIME,),
        seeds=5,
        prm=True,
    ),
    "5": Experiment(
        "5",
        "Where the PRM starts, and whether it learns on",
        "online from the SFT model beats online from EurusPRM, and both beat the offline PRM",
        PRIME,
        (OFFLINE_INIT, OFFLINE, RLOO),
        prm=True,
    ),
    "8": Experiment(
        "8",
        "Reference of the PRM",
        "policy and SFT reference are alike",
        PRIME,
        (POLICY_REFERENCE,),
        prm=True,
    ),
    "9": Experiment(
        "9",
        "Single and double forward",
        "double forward raises PRM accuracy after the update, but not the training reward",
        PRIME,
        (DOUBLE,),
        prm=True,
    ),
    "10": Experiment(
        "10",
        "Estimators with and without PRIME",
        "PRIME improves all of them; RLOO with PRIME is best",
        RLOO,
        (PRIME, REINFORCE, REINFORCE_PRIME, GRPO, GRPO_PRIME, PPO, PPO_PRIME),
    ),
    "11": Experiment(
        "11",
        "Value model or reward model",
        "the PRM as reward model beats it as value model, and a linear value head",
        REINFORCE,
        (REINFORCE_PRIME, AS_VALUE, PPO),
    ),
    "rates": Experiment(
        "rates",
        "Each at several learning rates of the policy",
        "(the paper has one)",
        RLOO,
        (
            PRIME,
            *(at_rate(arm, rate) for rate in ("1e-4", "4e-4") for arm in (RLOO, PRIME)),
        ),
        prm=True,
    ),
    "knobs": Experiment(
        "knobs",
        "What PRIME depends on here",
        "(the paper has one setting)",
        RLOO,
        (PRIME, *PRIME_KNOBS),
        prm=True,
    ),
    "groups": Experiment(
        "groups",
        "Eight responses to each of eight prompts",
        "16 responses instead of 4 end 4.4 % higher (a later revision)",
        RLOO_OF_EIGHT,
        (PRIME_OF_EIGHT,),
        prm=True,
    ),
}
