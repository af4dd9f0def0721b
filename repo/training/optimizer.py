"""Optimiser: learning-rate schedules, and AdamW for policy and critics with moments in fp32, bf16 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..common.errors import UserError
from ..config.schema import Config, OptimizerConfig
from ..models.sharding import local

BLOCK = 2**22  # elements updated at a time, which bounds the memory of their fp32 moments


def lr_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Compute the learning rate of a step: linear warm-up, then constant, or a cosine or linear decay towards 0.

    step: counted from 0. steps: steps of the whole run; a decay would reach 0 at step = steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.schedule == "linear" else config.lr


def make_optimizer(model: nn.Module, critics: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Make AdamW over policy and critics, each with its own learning rate, and weight decay on matrices only.

    Raises UserError if optimizer.state_dtype needs a missing package, or if optimizer.betas are too large for bfloat16.
    """
    groups: list[dict[str, Any]] = []
    for module, lr in ((model, config.optimizer.lr), (critics, config.critic.lr)):
        trained = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay, "lr": lr, "policy": module is model},
            {"params": vectors, "weight_decay": 0.0, "lr": lr, "policy": module is model},
        ]
    groups, betas, states = [g for g in groups if g["params"]], config.optimizer.betas, config.optimizer.state_dtype
    if states == "8bit":
        return _adamw_8bit()(groups, betas=betas)
    if states == "bfloat16":
        return BFloat16AdamW(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer.state_dtype 8bit needs the package bitsandbytes: pip install bitsandbytes") from None
    return AdamW8bit


class BFloat16AdamW(torch.optim.AdamW):
    """AdamW that computes in fp32 and rounds its two moments to bf16 (to nearest) after each step.

    This takes 4 bytes per weight instead of 8. A moment that decays by less than half a unit in the last place would
    round back to where it was, so betas above 1 - 2^-8 raise UserError.
    """

    def __init__(self, params: Any, betas: tuple[float, float]) -> None:
        if max(betas) > 1 - 2**-8:
            least = "in [0, 0.996] with optimizer.state_dtype bfloat16, whose moments would not decay with more"
            raise UserError(f"optimizer.betas must be {least}; got {list(betas)}")
        super().__init__(params, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: ignored."""
        for group in self.param_groups:
            options = {"beta1": group["betas"][0], "beta2": group["betas"][1]}
            options |= {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad", "maximize")}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, options)

    def _step_one(self, parameter: Tensor, options: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in "mv")
        assert parameter.grad is not None
        whole = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        tensors = [torch.atleast_1d(local(t)) for t in whole]  # this process's shard, if the weight is sharded
        rows = max(1, BLOCK * len(tensors[0]) // max(1, tensors[0].numel()))
        for pieces in zip(*(t.split(rows) for t in tensors), strict=True):
            # the fused kernel assumes that all four tensors have the same layout
            weight, gradient, m, v = (piece.to(parameter.dtype).contiguous() for piece in pieces)
            adamw([weight], [gradient], [m], [v], [], [state["step"].clone()], fused=True, **options)
            for piece, exact in zip(pieces, (weight, gradient, m, v), strict=True):
                if piece.data_ptr() != exact.data_ptr():
                    piece.copy_(exact)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state and round the moments to bf16 again: Optimizer casts them to the dtype of the weights."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].bfloat16()
