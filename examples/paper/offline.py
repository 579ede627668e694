"""The offline PRM: EurusPRM's part, trained on the start model's rollouts before any RL.

`rollout` samples and judges, `train_prm` learns; what comes out is a Hugging Face folder for
`prm.hf`.
"""

from __future__ import annotations

from runs import HERE, Place, launch

ROUNDS = 60  # of rollouts: 40 prompts with four responses each
STEPS = 140  # of 64 responses: nearly once through what is not held out
RATE = "2e-4"  # with that of an online PRM it follows the last batches
LONGEST = 52  # data.max_prompt_length + rollout.max_response_length of prime.toml


def train(place: Place) -> None:
    """Make `place.offline_prm`, if it is not there."""
    if (place.offline_prm / "config.json").exists():
        return
    folder = place.out / "offline"
    shared = [*place.start_knobs, *place.overrides]
    sampled = folder / "sampled"
    if not (sampled / "done").exists():
        knobs = [f"--run.folder={sampled}", "--run.seed=1000", f"--run.steps={ROUNDS}"]
        launch("rollout", HERE / "prime.toml", [*shared, *knobs], folder / "rollout.log")
        (sampled / "done").touch()
    knobs = [
        f"--run.folder={folder / 'trained'}",
        f"--train_prm.data={sampled / 'rollouts'}",
        f"--train_prm.output={place.offline_prm}",
        f"--train_prm.max_length={LONGEST}",
        f"--train_prm.steps={STEPS}",
        f"--prm.lr={RATE}",
    ]
    launch("train_prm", HERE / "prime.toml", [*shared, *knobs], folder / "train.log")
