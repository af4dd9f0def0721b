"""Inputs: what a run reads from outside its folder, by SHA-256, so that it never goes on with others unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..scoring.embedded import HeadScorer
from ..scoring.function import FunctionScorer
from ..scoring.scorers import Scorer
from ..setup import Parts

FILE = "inputs.json"


def fingerprints(parts: Parts) -> dict[str, str]:
    """SHA-256 by configuration field: of the reference's weights, of the prompts as tokens, of each scorer's manifest
    and its weights or the source of its module."""
    of_reference = _of_weights(parts.reference.model)
    found = {
        "model.path": of_reference,
        "data.train": _of_json([[p.id, p.text, p.token_ids] for p in parts.train_prompts]),
    }
    if parts.eval_prompts:
        found["data.eval"] = _of_json([[p.id, p.text, p.token_ids] for p in parts.eval_prompts])
    if parts.examples:
        found["ptx.data"] = _of_json([[e.prompt_ids, e.response_ids] for e in parts.examples])
    for signal, scorers in parts.scorers.parts.items():
        found[f"scoring.{signal}"] = _of_json(
            [[p.name, p.weight, _of_scorer(p.scorer, parts.reference.model, of_reference)] for p in scorers]
        )
    return found


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Fields whose input was another when the run began."""
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


def _of_scorer(scorer: Scorer, reference: nn.Module, of_reference: str) -> list[Any]:
    manifest: Any = scorer.manifest
    if isinstance(scorer, FunctionScorer):
        code = Path(scorer.source).read_bytes() if scorer.source and Path(scorer.source).is_file() else b""
        return [hashlib.sha256(code).hexdigest(), asdict(manifest)]
    if isinstance(scorer, HeadScorer):
        trunk: Any = scorer.trunk.model
        of_trunk = of_reference if trunk is reference else _of_weights(trunk)
        return [_of_tensors([scorer.weight, scorer.bias]), of_trunk, asdict(manifest)]
    return [_of_weights(scorer.model), asdict(manifest)]


def _of_weights(model: nn.Module) -> str:
    """Of the weights that a model was loaded with: adapters, which are trained, are left out."""
    return _of_tensors(p for name, p in model.named_parameters() if "lora_" not in name)


def _of_tensors(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        buffer: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(buffer)
    return digest.hexdigest()


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
