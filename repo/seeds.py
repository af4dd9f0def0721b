"""Seeds that depend on names and numbers only, so that a draw never depends on what was drawn before it."""

from __future__ import annotations

import hashlib

import torch


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from the parts, e.g. (run seed, step, prompt id, sample)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the parts."""
    return torch.Generator().manual_seed(seed_from(*parts))
