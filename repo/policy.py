"""The policy: loading a causal LM with its tokenizer, and the log-probabilities it gives to responses."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo_kernels import selective_log_softmax

from .errors import UserError, first_line
from .seeds import generator
from .sequences import Sequences, make_sequences, micro_batches
from .tree import attends_everywhere, make_tree


@dataclass(frozen=True)
class Policy:
    """A causal LM in eval mode (no dropout: the ratio is exact), its tokenizer and its stop tokens.

    shares_prefix: a prompt is computed once for all its responses (tree.py).
    """

    model: Any
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    device: torch.device
    shares_prefix: bool

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
    except Exception as error:  # each format and tokenizer library raises its own kind
        raise UserError(f"model.path: cannot load {path!r}: {first_line(error)}") from error
    model.to(device).eval().requires_grad_(trainable)
    eos = end_of_sequence_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    policy = Policy(model, tokenizer, eos, pad, device, shares_prefix=False)
    return dataclasses.replace(policy, shares_prefix=shares_prefix_exactly(policy))


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
    return _tree_logits(policy, sequences) if policy.shares_prefix else _padded_logits(policy, sequences)


def _padded_logits(policy: Policy, sequences: Sequences) -> Tensor:
    """One row per response, with the 2-D mask that every causal LM takes."""
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


def _tree_logits(policy: Policy, sequences: Sequences) -> Tensor:
    """One row per prompt with all its responses, with a 4-D mask."""
    tree = make_tree(sequences)
    width = sequences.response_ids.shape[1]
    hidden_keys = torch.finfo(policy.model.dtype).min * (~tree.visible).to(policy.model.dtype)
    logits = policy.model(
        input_ids=tree.input_ids,
        attention_mask=hidden_keys[:, None],
        position_ids=tree.position_ids,
        use_cache=False,
        logits_to_keep=tree.slots * width,
    ).logits
    logits = logits.reshape(len(tree.input_ids) * tree.slots, width, -1)
    in_order = tree.slot_of.numel() == len(logits) and bool((tree.slot_of.diff() == 1).all())
    return logits if in_order else logits[tree.slot_of]


@torch.no_grad()
def shares_prefix_exactly(policy: Policy) -> bool:
    """Whether the tree gives the logits of separate sequences: by the model's config, then by trying it.

    The trial catches models that ignore a 4-D mask or refuse one, which no config field tells.
    """
    accepted = inspect.signature(policy.model.forward).parameters
    if not (attends_everywhere(policy.model.config) and {"position_ids", "logits_to_keep"} <= accepted.keys()):
        return False
    ids = torch.randint(0, vocabulary(policy), (4, 5), generator=generator("prefix probe")).tolist()
    prompts = [ids[0], ids[0], ids[1][:3], ids[1][:3]]
    group = torch.tensor([0, 0, 1, 1])
    probe = make_sequences(prompts, [ids[2], ids[3][:2], ids[3], ids[2][:4]], 0, group).to(policy.device)
    try:
        shared, separate = _tree_logits(policy, probe), _padded_logits(policy, probe)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    difference = (torch.log_softmax(shared, -1) - torch.log_softmax(separate, -1))[probe.response_mask].abs().max()
    return bool(difference < 1e-3)


def vocabulary(policy: Policy) -> int:
    """Rows of the LM head."""
    return int(policy.model.config.get_text_config().vocab_size)


@torch.no_grad()
def response_logps(policy: Policy, sequences: Sequences, temperature: float, budget: int) -> Tensor:
    """(B, R) fp32 log-probabilities of response tokens, 0 beyond each response; forward passes of <= budget tokens."""
    out = torch.zeros(sequences.response_ids.shape, dtype=torch.float32)
    for rows in micro_batches(sequences, torch.arange(len(out)), budget, policy.shares_prefix):
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
