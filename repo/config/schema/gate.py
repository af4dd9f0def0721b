"""The gate that accepts or takes back policies during training."""

from __future__ import annotations

from dataclasses import dataclass

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt


@dataclass(frozen=True)
class GateConfig:
    """The gate: accept the policy only if it is surely not less safe than the last accepted one, else go back to it."""

    every: NonNegativeInt = 0
    """Number of steps between decisions; one more follows the last step. 0: no gate. A decision compares the safe rate
    on 64 validation prompts with that of the last accepted policy, at first the reference. A policy that is not
    accepted is replaced by the last accepted one, with its optimiser and lambda, and the learning rate is halved."""
    tolerance: ClosedUnitInterval = 0.0
    """Loss of the safe rate that the gate lets pass: a policy is accepted if the lower 95 % bound of its change, over
    prompts, is at least -tolerance. 0: only a policy that is surely as safe; about 0.05 lets noise pass."""
