"""The policy: a causal LM with its tokenizer, its loading and saving, and the context of its forward passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_kernels.layers.fused_layers import fused_layers
from repo_kernels.layers.onednn_linear import onednn_linears

from ..common.errors import UserError, first_line
from ..common.hub import require_model
from ..config.schema import ModelConfig
from .attention import Attention, choose_attention
from .layers import compile_layers, recomputed
from .lm_head import check_head


@dataclass(frozen=True)
class Policy:
    """A causal LM, its tokenizer and its stop tokens. The model is in eval mode: without dropout the ratio is exact.

    model: the causal LM. eos_ids: ids that end a response. pad_id: fills padding. device: of the forward pass.
    attention: the way it reads prompts and responses.
    base_only: switch the LoRA adapters off, which makes it the reference.
    autocast: dtype of the forward pass, None for that of the weights.
    recomputes: gradient checkpointing is on. compiled: the decoder layers are compiled.
    """

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    device: torch.device
    attention: Attention
    base_only: bool = False
    autocast: torch.dtype | None = None
    recomputes: bool = False
    compiled: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Open the context for every forward pass: adapters on or off, autocast, and fused layers on a CPU."""
        if self.base_only:
            self.model.disable_adapters()
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None), self._layers():
                yield
        finally:
            if self.base_only:
                self.model.enable_adapters()

    @contextmanager
    def _layers(self) -> Iterator[None]:
        """Run linear layers, norms, gated MLPs and rotary embeddings by repo_kernels, on a CPU in fp32.

        Compiled layers stay as they are.
        """
        with ExitStack() as stack:
            for replaced in () if self.compiled else (onednn_linears, fused_layers):
                stack.enter_context(replaced(self.model))
            yield

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Open the context for a forward and its backward pass: gradient checkpointing, if it is configured."""
        if not self.recomputes:
            yield
            return
        with self._layers(), recomputed(self.model):
            yield


def choose_device(name: str) -> torch.device:
    """Return the torch device that model.device names; "auto" is CUDA if it is available, else the CPU.

    Raises UserError if the device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_policy(
    path: str, device: torch.device, trainable: bool, config: ModelConfig | None = None, trust: bool = False
) -> Policy:
    """Load a causal LM, add LoRA adapters if configured, and choose its attention.

    Args:
        path: folder or hub name.
        trainable: True loads weights to train in fp32, or with LoRA frozen weights in config.dtype and adapters in
            fp32. False loads frozen weights in config.dtype.
        config: dtype, lora_rank, gradient_checkpointing and compile; None for the defaults.
        trust: run Python code that comes with the model.

    Raises:
        UserError: transformers cannot load the model, a weight is not finite, the logits are not a linear LM head's, or
            there is no end-of-sequence token.
    """
    config = config or ModelConfig()
    dtype, lora = getattr(torch, config.dtype), trainable and config.lora_rank > 0
    full = trainable and not lora
    require_model(path, "model.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32 if full else dtype, trust_remote_code=trust
        )
    except Exception as error:  # formats and tokenizer libraries raise errors of many types
        raise UserError(f"model.path: cannot load {path!r}: {first_line(error)}") from error
    if bad := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise UserError(f"model.path: weight {bad} of {path!r} is not finite")
    model.to(device).eval().requires_grad_(full)
    if lora:
        add_lora(model, config.lora_rank)
    eos = end_of_sequence_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    autocast = None if dtype == model.dtype else dtype
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        check_head(model)
        attention = choose_attention(model, device, autocast or model.dtype)
    compiled, recomputes = trainable and config.compile, trainable and config.gradient_checkpointing
    if compiled:
        compile_layers(model)
    return Policy(
        model, tokenizer, eos, pad, device, attention, autocast=autocast, recomputes=recomputes, compiled=compiled
    )


def add_lora(model: Any, rank: int) -> None:
    """Add trainable fp32 LoRA adapters to every linear layer except the LM head; at first they change no output.

    Raises UserError if peft is missing or does not support the model.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("model.lora_rank needs the package peft: pip install peft") from None
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every run starts with the same random factor
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        try:
            model.add_adapter(config)
        except (ImportError, ValueError) as error:  # transformers refuses old versions of peft
            raise UserError(f"model.lora_rank: {first_line(error)}") from error
    model.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def load_reference(policy: Policy, path: str, config: ModelConfig, trust: bool = False) -> Policy:
    """Load the frozen reference: with LoRA the policy without its adapters, else a second model from `path`."""
    if config.lora_rank:
        return dataclasses.replace(policy, base_only=True)
    return load_policy(path, policy.device, False, config, trust)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """List every id that ends a response, from the generation config, the model config and the tokenizer, each once.

    Raises UserError if there is none.
    """
    ids: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not ids:
        raise UserError("the model has no end-of-sequence token in its generation config, config or tokenizer")
    return tuple(dict.fromkeys(ids))


def vocabulary(policy: Policy) -> int:
    """Return the size of the vocabulary, the number of rows of the LM head."""
    return int(policy.model.config.get_text_config().vocab_size)


def save_policy(policy: Policy, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Save weights (safetensors), configs and tokenizer into a folder, in Hugging Face format.

    weights: name -> whole tensor, needed for a sharded model; None: the model's own.
    """
    policy.model.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
