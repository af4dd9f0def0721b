"""The policy: loading a causal LM with its tokenizer, and the log-probabilities it gives to responses."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_kernels import selective_log_softmax

from .errors import UserError
from .sequences import Sequences, micro_batches


@dataclass(frozen=True)
class Policy:
    """A causal LM in eval mode (no dropout: the ratio is exact), its tokenizer and its stop tokens."""

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    device: torch.device

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())


def choose_device(name: str) -> torch.device:
    """ "auto" -> CUDA where there is one, else CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_policy(path: str, device: torch.device, trainable: bool) -> Policy:
    """Load a folder or hub name in fp32. UserError when transformers cannot."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot load {path!r}: {str(error).splitlines()[0]}") from None
    model.to(device).eval().requires_grad_(trainable)
    eos = end_of_sequence_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return Policy(model, tokenizer, eos, pad, device)


def end_of_sequence_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: of the generation config, the model config and the tokenizer."""
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not found:
        raise UserError("the model has no end-of-sequence token in its generation config, config or tokenizer")
    return tuple(dict.fromkeys(found))


def response_logits(policy: Policy, sequences: Sequences) -> Tensor:
    """(B, R, V): row t scores response token t. Only these rows reach the LM head where the model allows it."""
    width = sequences.response_ids.shape[1]
    arguments = {
        "input_ids": sequences.input_ids[:, :-1],
        "attention_mask": sequences.attention_mask[:, :-1].to(torch.int64),
        "use_cache": False,
    }
    accepted = inspect.signature(policy.model.forward).parameters
    if "position_ids" in accepted:
        arguments["position_ids"] = sequences.position_ids[:, :-1]
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = width
    return policy.model(**arguments).logits[:, -width:]


@torch.no_grad()
def response_logps(policy: Policy, sequences: Sequences, temperature: float, budget: int) -> Tensor:
    """(B, R) fp32 log-probabilities of response tokens, 0 beyond each response; forward passes of <= budget tokens."""
    out = torch.zeros(sequences.response_ids.shape, dtype=torch.float32)
    for rows in micro_batches(sequences, torch.arange(len(out)), budget):
        part = sequences.select(rows).to(policy.device)
        ids = part.response_ids.masked_fill(~part.response_mask, -100)
        logps = selective_log_softmax(response_logits(policy, part), ids, temperature=temperature)
        assert isinstance(logps, Tensor)
        out[rows, : logps.shape[1]] = logps.to("cpu", torch.float32)
    return out


def save_policy(policy: Policy, folder: Path) -> None:
    """Weights (safetensors), configs and tokenizer in Hugging Face format."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
