"""Weights: write the policy's weights, adapters merged, into a folder from which vLLM loads them."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.adapters import has_adapters, remove_adapters
from .worker import STEP_FILE

MEMORY = Path("/dev/shm")  # a file system in memory
ROOM = 1.1  # free bytes that a file system must have, per byte of the weights


def make_work_folder(weight_bytes: int) -> Path:
    """Create a folder for weights of that size: in memory where there is room, else among the temporary files."""
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM * weight_bytes
    return Path(tempfile.mkdtemp(prefix="repo-vllm-", dir=MEMORY if in_memory else None))


class WeightWriter:
    """Writes a model in the format of Hugging Face, under the names that its own checkpoint has."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """model: the policy, with or without LoRA adapters. dtype: type to round the weights to."""
        self.model, self.dtype = model, dtype
        self.plain = _without_weights(model) if has_adapters(model) else model

    def write(self, folder: Path, step: int | None, negated: bool = False) -> None:
        """Create a folder with config, weights and the step that they are of.

        negated: change the sign of every weight, which makes another model that leaves none of them as it is.
        """
        weights = merged_weights(self.model, self.dtype)
        if negated:
            opposite = {w.data_ptr(): -w for w in weights.values()}
            weights = {name: opposite[w.data_ptr()] for name, w in weights.items()}
        self.plain.save_pretrained(folder, state_dict=weights)
        (folder / STEP_FILE).write_text(json.dumps({"step": step}))


@torch.no_grad()
def merged_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all weights on the CPU by their names in the model without adapters, which are added to them.

    Sums are made in fp32 and rounded once to `dtype`. Tied weights share memory, as they do in the model.
    """
    layers = _adapted_layers(model)
    weights: dict[str, Tensor] = {}
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for name, value in model.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers and rest == "weight":
            delta = sum(layers[owner].get_delta_weight(a).float() for a in layers[owner].active_adapters)
            weights[f"{owner}.weight"] = (value.float() + delta).to("cpu", dtype)
        elif not _belongs_to_adapter(name, layers):
            key = value.data_ptr(), value.shape
            if key not in moved:
                moved[key] = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
            weights[name.replace(".base_layer.", ".")] = moved[key]
    return weights


def _adapted_layers(model: Any) -> dict[str, Any]:
    """Return the layers that have LoRA adapters, by name."""
    if not has_adapters(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _belongs_to_adapter(name: str, layers: dict[str, Any]) -> bool:
    """Tell whether a tensor of that name is part of an adapter: in an adapted layer, but not in its base layer."""
    parts = name.split(".")
    owners = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(owner in layers and parts[len(owner.split("."))] != "base_layer" for owner in owners)


def _without_weights(model: nn.Module) -> Any:
    """Copy a model without the memory of its weights, and remove the adapters of the copy."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    plain = copy.deepcopy(model, memo)
    remove_adapters(plain)
    return plain
