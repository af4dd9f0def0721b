"""AdamW and the optimiser steps of a rollout batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and the division of a rollout batch into optimiser steps."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate of the policy. The default suits the embedded model of 135 M parameters; for larger models try
    1e-6 to 1e-5."""
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment, each < 1; at most 0.996 with state_dtype bfloat16."""
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Type of AdamW's two moments, which take 8, 4 or about 2 bytes per trained weight. 8bit needs the package
    bitsandbytes."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices, in the policy and the critics; vectors (norms, biases) have none."""
    warmup_steps: NonNegativeInt = 2
    """Number of steps over which the policy's learning rate rises linearly. 0: no warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the policy's learning rate after the warm-up. cosine and linear fall so as to reach 0 one step after
    the last."""
    clip_norm: PositiveFloat = 1.0
    """Scale gradients with a larger L2 norm down to this norm; the policy and the critics separately."""
    epochs: PositiveInt = 1
    """Number of passes over each rollout batch."""
    minibatches: PositiveInt = 1
    """Number of optimiser steps per pass. Each takes an equal share of the responses, in random order."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = 2048
    """Largest number of tokens in one forward and backward pass, padding included; a longer prompt and response get a
    pass of their own. Affects memory and speed, and the result by rounding only. "auto": the largest number for which
    the run fits into the memory that is free at its start, but not more than a rollout batch has; the run's config.yaml
    keeps the number, so that a resumed run computes the same."""
    max_skipped: PositiveInt = 3
    """Stop the run after this many optimiser steps in a row with a loss or gradient that is not finite. Each such step
    is skipped."""

    @property
    def budget(self) -> int:
        """Return micro_batch_tokens as a number. Raises ValueError while it is "auto", before the models are loaded."""
        if self.micro_batch_tokens == "auto":
            raise ValueError("optimizer.micro_batch_tokens is auto; repo.memory.budget.pick chooses the number")
        return int(self.micro_batch_tokens)
