"""LoRA adapters: add new ones to a model, and merge those of an adapter folder or of a run into the weights."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..common.config_fields import config_field
from ..common.errors import UserError, first_line

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# layers that peft refuses, because their kernels read the weights directly
NOT_ADAPTED = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1"), ("out_proj",))


def add_lora(model: Any, rank: int) -> bool:
    """Add trainable fp32 LoRA adapters to every linear layer except the LM head and the routers of experts.

    Experts get adapters where they are linear layers, not where a model holds all of them in one tensor. At first the
    adapters change no output.

    Returns True if peft cannot load such adapters from a folder, because it maps the names of some of these layers to
    the tensors of experts; they must then be saved merged. Raises UserError if peft is missing or does not support the
    model.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("model.lora_rank needs the package peft: pip install peft") from None
    names = linear_layers(model)
    if not names:
        raise UserError(f"model.lora_rank: {type(model).__name__} has no linear layer that can have an adapter")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every run starts with the same random factor
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
        renamed = _is_renamed(config, model)
        try:
            with patch.object(model.config, "model_type", "") if renamed else patch.dict({}):  # peft renames by type
                model.add_adapter(config)
        except (ImportError, ValueError) as error:  # transformers refuses old versions of peft
            raise UserError(f"model.lora_rank: {first_line(error)}") from error
    model.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return renamed


def linear_layers(model: Any) -> list[str]:
    """List the names of a model's linear layers, without the LM head and the routers of experts."""
    from transformers.pytorch_utils import Conv1D

    text, head = model.config.get_text_config(), model.get_output_embeddings()
    counts = {config_field(text, name) for name in EXPERT_COUNTS} - {None}
    refused = NOT_ADAPTED.get(text.model_type, ())
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head:
            continue
        parts = name.split(".")
        routes = getattr(module, "out_features", None) in counts and ("gate" in parts[-1] or "router" in name)
        if not routes and "router" not in parts and parts[-1] not in refused:
            names.append(name)
    return names


def _is_renamed(config: Any, model: Any) -> bool:
    """Tell whether peft would replace some of a LoRA config's layers by others of this type of model."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older versions take the names as they are
        return False
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model=model, conversions=None)
    except ValueError:  # the names cannot be mapped
        return True
    return set(converted.target_modules) != set(config.target_modules) or bool(converted.target_parameters)


def has_adapters(model: Any) -> bool:
    """Tell whether LoRA adapters are attached to a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_linear(module: Any) -> bool:
    """Tell whether a module is an nn.Linear, or one with plain LoRA adapters, whose product is that of one weight."""
    if type(module) is nn.Linear:
        return True
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "get_delta_weight"):
        return False
    plain = not (getattr(module, "lora_variant", None) or any(getattr(module, "lora_bias", {}).values()))
    return plain and all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())


@torch.no_grad()
def weight_of(module: Any) -> Tensor:
    """Return the weight (out, in) of a module that `is_linear` accepts, with its adapters added unless they are off."""
    if type(module) is nn.Linear:
        return module.weight
    weight = module.base_layer.weight
    if module.disable_adapters or module.merged:
        return weight
    return sum((module.get_delta_weight(name) for name in module.active_adapters), start=weight)


@torch.no_grad()
def merge_adapters(model: Any) -> None:
    """Add the adapters of a model to its weights, in place, and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    remove_adapters(model)


def remove_adapters(model: Any) -> None:
    """Replace every layer that has an adapter by the layer without it, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            _replace(model, name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            _replace(model, name, module.modules_to_save[module.active_adapters[0]])
    model._hf_peft_config_loaded = False
    del model.peft_config
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()


def load_merged(model: Any, path: str) -> None:
    """Load the adapter in a folder or on the hub and merge it into its base model, in place."""
    conversions = getattr(model, "_weight_conversions", None)
    model.load_adapter(path)
    merge_adapters(model)
    model._weight_conversions = conversions  # the adapter's would rename the weights when the model is saved


def _replace(model: Any, name: str, module: Any) -> None:
    """Put a module in the place of another one."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
