"""The policy: a causal LM with its tokenizer, its loading and saving, and the context of its forward passes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from repo_kernels.layers.bf16_linear import bf16_linears
from repo_kernels.layers.fused_layers import fused_layers
from repo_kernels.layers.onednn_linear import onednn_linears

from ..common.adapter_folder import base_of
from ..common.errors import UserError, first_line
from ..common.hub import require_model
from ..config.schema import ModelConfig
from ..data.token_ids import padding_id
from .adapters import add_lora, has_adapters, load_merged, merge_adapters
from .fast_layers.working_copies import working_copies
from .layers import compile_layers, recomputed
from .layout import Attention, choose_attention
from .lm_head import check_head
from .matmul import Matmul, choose_matmul
from .quantised import keep_unpacked, quantisation, require_trainable


@dataclass(frozen=True)
class Policy:
    """A causal LM, its tokenizer and its stop tokens. The model is in eval mode: without dropout the ratio is exact.

    model: the causal LM. eos_ids: ids that end a response. pad_id: fills padding. device: of the forward pass.
    attention: the way it reads prompts and responses.
    base_only: switch the LoRA adapters off, which makes it the reference.
    autocast: dtype of the forward pass, None for that of the weights.
    matmul: type of the products of linear layers on a CPU in fp32, None elsewhere.
    recomputes: gradient checkpointing is on. compiled: the decoder layers are compiled. copied: trained fp32 weights
    are cast to the dtype of the forward pass once per optimiser step. liger: on a GPU, Liger computes norms, rotary
    embeddings and SwiGLU. layers: words for these, and why not.
    merged: base model of the adapter folder that was loaded and merged into it, None for a whole model.
    saves_merged: adapters are merged into the weights when it is saved, because they do not fit the base that is named.
    """

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    device: torch.device
    attention: Attention
    base_only: bool = False
    autocast: torch.dtype | None = None
    matmul: Matmul | None = None
    recomputes: bool = False
    compiled: bool = False
    copied: bool = False
    liger: bool = False
    layers: str = ""
    merged: str | None = None
    saves_merged: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Open the context for every forward pass: adapters on or off, autocast, and fused layers on a CPU."""
        with (
            self.adapters(),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            self._layers(),
        ):
            yield

    def exact(self) -> Policy:
        """Return the policy with products in the type of its weights, in which decoders are compared."""
        return dataclasses.replace(self, matmul=None, liger=False)

    @contextmanager
    def adapters(self) -> Iterator[None]:
        """Open the context in which the LoRA adapters are off for a reference that is the policy without them."""
        if self.base_only:
            self.model.disable_adapters()
        try:
            yield
        finally:
            if self.base_only:
                self.model.enable_adapters()

    @contextmanager
    def _layers(self) -> Iterator[None]:
        """Run linear layers, norms, gated MLPs and rotary embeddings by repo_kernels, on a CPU in fp32.

        Compiled layers stay as they are.
        """
        linears = bf16_linears if self.matmul is not None and self.matmul.half else onednn_linears
        with ExitStack() as stack:
            for replaced in () if self.compiled else (linears, partial(fused_layers, liger=self.liger)):
                stack.enter_context(replaced(self.model))
            yield

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Open the context of all passes between two changes of the weights, which are cast once in it."""
        with working_copies(self.model, self.dtype) if self.copied else nullcontext():
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the forward pass."""
        return self.autocast or self.model.dtype

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
    """Load a causal LM, add LoRA adapters if configured, and choose the way in which it reads.

    An adapter folder is merged into its base model.

    Args:
        path: folder or hub name.
        trainable: True loads weights to train in fp32, or with LoRA frozen weights in config.dtype and adapters in
            fp32. False loads frozen weights in config.dtype.
        config: dtype, matmul_dtype, lora_rank, gradient_checkpointing and compile; None for the defaults.
        trust: run Python code that comes with the model.

    Raises:
        UserError: transformers cannot load the model, a weight is not finite or is quantised and would be trained, the
            logits are not a linear LM head's, sequences are not read the same in any layout, or there is no
            end-of-sequence token.
    """
    config = config or ModelConfig()
    dtype, lora = getattr(torch, config.dtype), trainable and config.lora_rank > 0
    full = trainable and not lora
    require_model(path, "model.path")
    model, tokenizer, merged = _load(path, device, torch.float32 if full else dtype, trust)
    if bad := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise UserError(f"model.path: weight {bad} of {path!r} is not finite")
    if full:
        require_trainable(model.config, 0, path)
    if not quantisation(model.config):
        model.to(device)
    model.eval().requires_grad_(full)
    saves_merged = lora and (add_lora(model, config.lora_rank) or merged is not None)
    if lora:
        keep_unpacked(model)
    eos = end_of_sequence_ids(model, tokenizer)
    pad = padding_id(model, (tokenizer.pad_token_id, *eos))
    autocast = None if dtype == model.dtype else dtype
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        check_head(model)
        attention = choose_attention(model, device, autocast or model.dtype)
        matmul = choose_matmul(model, config, device, trainable)
    compiled, recomputes = trainable and config.compile is True, trainable and config.gradient_checkpointing
    if compiled:
        compile_layers(model)
    return Policy(
        model,
        tokenizer,
        eos,
        pad,
        device,
        attention,
        autocast=autocast,
        matmul=matmul,
        recomputes=recomputes,
        compiled=compiled,
        merged=merged,
        saves_merged=saves_merged,
    )


def _load(path: str, device: torch.device, dtype: torch.dtype, trust: bool) -> tuple[Any, Any, str | None]:
    """Load model and tokenizer; an adapter is merged. Returns both, and the base model of an adapter folder or None.

    Raises UserError if transformers cannot load them.
    """
    base = base_of(path, "model.path")
    try:
        model = _load_weights(base or path, device, dtype, trust)
        if base is None and has_adapters(model):  # an adapter on the hub, whose base transformers has loaded
            base = str(next(iter(model.peft_config.values())).base_model_name_or_path)
            model = _load_weights(base, device, dtype, trust)
        if base is not None:
            if quantised := quantisation(model.config):
                raise UserError(
                    f"model.path: {path!r} is an adapter for a quantised model ({quantised}), into which it cannot be "
                    "merged without a loss; merge it into the model that was quantised"
                )
            load_merged(model, path)
    except UserError:
        raise
    except Exception as error:  # formats and tokenizer libraries raise errors of many types
        raise UserError(f"model.path: cannot load {path!r}: {first_line(error)}") from error
    return model, _load_tokenizer(path, base, trust), base


def _load_weights(path: str, device: torch.device, dtype: torch.dtype, trust: bool) -> Any:
    """Load a causal LM. Raises ValueError if the checkpoint lacks some of its weights."""
    shape = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    # quantised weights are packed for their device when they are loaded, and cannot be moved afterwards
    placed = {"device_map": {"": device}} if getattr(shape, "quantization_config", None) else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=trust, output_loading_info=True, **placed
    )
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"it lacks the weights {', '.join(missing[:3])}")
    return model


def _load_tokenizer(path: str, base: str | None, trust: bool) -> Any:
    """Load the tokenizer of a model, or for an adapter folder that has none, that of its base."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:
        if base is not None:
            return _load_tokenizer(base, None, trust)
        raise UserError(f"model.path: cannot load {path!r}: {first_line(error)}") from error


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
    model = policy.model
    if policy.saves_merged and has_adapters(model):
        model = copy.deepcopy(model)
        merge_adapters(model)
    model.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)


def merged(policy: Policy, option: str) -> Policy:
    """Return a policy whose adapters are merged into its weights, in place; one without adapters as it is.

    option: what asks for it. Raises UserError, which names it, if the weights are quantised.
    """
    if has_adapters(policy.model):
        if quantised := quantisation(policy.model.config):
            raise UserError(f"{option}: adapters cannot be merged into quantised weights ({quantised}) without a loss")
        merge_adapters(policy.model)
    return policy
