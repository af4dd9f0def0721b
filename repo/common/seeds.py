"""Seeds that depend on names and numbers only, so that a draw never depends on what was drawn before it."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from the parts, e.g. (run seed, step, prompt id, sample)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_from(*parts))


def random_state() -> dict[str, Any]:
    """States of the global generators of PyTorch (CPU), NumPy and Python, as JSON. The loop draws from none of them;
    scorers of the user's own may."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from where `random_state` was called."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
