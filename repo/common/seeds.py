"""Seeds derived from names and numbers alone, so that no draw depends on the draws before it."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_from(*parts: int | str) -> int:
    """Hash the parts, e.g. (run seed, step, prompt id, sample), into a 63-bit seed."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Make a CPU generator seeded with `seed_from(*parts)`."""
    return torch.Generator().manual_seed(seed_from(*parts))


def random_state() -> dict[str, Any]:
    """Return the states of the global generators of PyTorch (CPU), NumPy and Python, in values that JSON can hold.

    The training loop draws from none of them, but the user's own scorers may.
    """
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the global generators to a state that `random_state` returned."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
