"""Fingerprints: SHA-256 of everything that a run reads from outside, so that it never continues with other inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.prompts import Example, Prompt
from ..scoring.embedded import HeadScorer
from ..scoring.function import FunctionScorer
from ..scoring.scorers import Scorer, Scorers

FILE = "inputs.json"


def fingerprints(
    reference: nn.Module,
    scorers: Scorers,
    train_prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
    examples: Sequence[Example],
    gate_prompts: Sequence[Prompt] = (),
) -> dict[str, str]:
    """Hash the inputs of a run.

    Returns SHA-256 digests in hex by configuration field: of the reference's weights, of prompts and examples as
    tokens, and of each signal's scorers (manifest, and weights or the source of the function's module).
    """
    of_reference = _of_weights(reference)
    hashes = {"model.path": of_reference, "data.train": _of_json([_of_prompt(p) for p in train_prompts])}
    if eval_prompts:
        hashes["data.eval"] = _of_json([_of_prompt(p) for p in eval_prompts])
    if gate_prompts:
        hashes["gate.every"] = _of_json([_of_prompt(p) for p in gate_prompts])
    if examples:
        hashes["ptx.data"] = _of_json([[e.prompt_ids, e.response_ids] for e in examples])
    for signal, parts in scorers.parts.items():
        hashes[f"scoring.{signal}"] = _of_json(
            [[part.name, part.weight, _of_scorer(part.scorer, reference, of_reference)] for part in parts]
        )
    return hashes


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """List the fields whose fingerprint differs. before: at the start of the run; fields in only one are skipped."""
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def _of_prompt(prompt: Prompt) -> list[Any]:
    return [prompt.id, prompt.text, prompt.token_ids, *(example.response_ids for example in prompt.pair)]


def _of_scorer(scorer: Scorer, reference: nn.Module, of_reference: str) -> list[Any]:
    manifest: Any = scorer.manifest
    if isinstance(scorer, FunctionScorer):
        code = Path(scorer.source).read_bytes() if scorer.source and Path(scorer.source).is_file() else b""
        return [hashlib.sha256(code).hexdigest(), asdict(manifest)]
    if isinstance(scorer, HeadScorer):
        trunk: Any = scorer.trunk.model
        of_trunk = of_reference if trunk is reference else _of_weights(trunk)
        return [_of_tensors([scorer.weight, scorer.bias]), of_trunk, asdict(manifest)]
    unit = [] if scorer.unit_name == "logit" else [scorer.unit_name]  # as in runs that knew logits only
    return [_of_weights(scorer.model), asdict(manifest), *unit]


def _of_weights(model: nn.Module) -> str:
    """Hash the weights that a model was loaded with, without LoRA adapters, since training changes them."""
    return _of_tensors(p for name, p in model.named_parameters() if "lora_" not in name)


def _of_tensors(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        buffer: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(buffer)
    return digest.hexdigest()


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
