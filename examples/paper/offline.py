"""The offline PRM: EurusPRM's part, trained on the start model's rollouts before any RL.

`debug.rollouts_from` plays the same rollouts to the PRM as a run would have made them, and the
policy's learning rate is too small to move it; what the PRM is at the end becomes a Hugging Face
folder for `prm.hf`.
"""

from __future__ import annotations

from localise import convert
from runs import HERE, Place, launch

ROUNDS = 60  # of rollouts; some batches take more than one
STEPS = 50  # of prime.toml's batch: the rollouts that the PRM learns from
RATE = "2e-4"  # its learning rate; with that of an online PRM it follows the last batches


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
        f"--debug.rollouts_from={sampled / 'rollouts'}",
        "--debug.save_rollouts=false",
        "--policy.lr=1e-12",
        f"--prm.lr={RATE}",
        f"--run.steps={STEPS}",
    ]
    launch("train", HERE / "prime.toml", [*shared, *knobs], folder / "train.log")
    convert(folder / "trained" / "checkpoints" / f"step_{STEPS:06d}", place.offline_prm)
