"""The random states of one rank, in a file.

Plain tensors, numbers and lists, so that the loader that runs no pickles can read them.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def save(path: Path) -> None:
    """Write the states of Python, NumPy, torch and Megatron."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    torch.save(state, path)


def restore(path: Path) -> None:
    """Go on with the states that `save` wrote."""
    state = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
