"""Weights: what a run holds from its start to its end, the same in every step."""

from __future__ import annotations

from torch import nn

from .process import Process, parameters_of

STATE_BYTES = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 * 4 / 256}  # per trained weight; 8bit: fp32 scale per 256


def states_per_weight(process: Process) -> float:
    """Return the bytes of AdamW's two moments per trained weight."""
    return STATE_BYTES[process.config.optimizer.state_dtype]


def loaded(process: Process) -> dict[str, float]:
    """Map names to bytes of the weights that are there once the models are loaded."""
    settings, model = process.config.model, process.model
    trained, element = parameters_of(model, trained_only=True), process.dtype.itemsize
    frozen, weights = frozen_bytes(model), parameters_of(model)
    lora = settings.lora_rank > 0
    held = {
        f"policy weights ({trained / 1e6:.1f} M trained, fp32)": 4 * trained / process.shards + frozen,
        "reference weights" + (": the policy without its adapter" if lora else ""): 0 if lora else element * weights,
    }
    if process.shards > 1:
        held[f"whole copy for sampling {settings.dtype}"] = element * weights
    if process.scorers:
        held["scorers and judge"] = process.scorers
    return held


def trained(process: Process) -> dict[str, float]:
    """Map names to bytes of what the first update adds to the weights, and of the critics, which are like it."""
    name, per_weight = process.config.optimizer.state_dtype, states_per_weight(process)
    held = {f"AdamW states {name}": per_weight * parameters_of(process.model, trained_only=True) / process.shards}
    if process.critics is not None and (count := parameters_of(process.critics)):
        held[f"critics with gradients and AdamW states {name}"] = (8 + per_weight) * count / process.shards
    return held


def frozen_bytes(model: nn.Module) -> int:
    """Add up the bytes of the weights that are not trained, as they are stored."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
