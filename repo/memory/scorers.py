"""Scorers: the bytes of the weights that scorers and a judge hold beside the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from ..common.adapter_folder import base_of
from ..config.schema import Config
from ..scoring.classifier import ClassifierScorer
from ..scoring.embedded import HeadScorer
from ..scoring.judge import NONE, ScorerJudge
from ..scoring.scorers import EMBEDDED, FUNCTION, Scorers, scorer_names


def scorer_bytes(scorers: Scorers, judge: Any, reference: nn.Module) -> int:
    """Add up the weights of loaded scorers and of a judge that is a scorer, each model once.

    reference: the model of the reference, which embedded scorers may share and which does not count.
    """
    parts: list[Any] = [part.scorer for parts in scorers.parts.values() for part in parts]
    parts += [judge.scorer] if isinstance(judge, ScorerJudge) else []
    models = [s.trunk.model for s in parts if isinstance(s, HeadScorer)]
    models += [s.model for s in parts if isinstance(s, ClassifierScorer)]
    weights = {id(p): p for model in models if model is not reference for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in weights.values())


def planned_scorer_bytes(config: Config, device: str, trust: bool = False) -> int | None:
    """Compute the same before anything is loaded, from the configs of the models; None if that is not possible.

    device: type of the device. trust: run Python code that comes with a model.
    """
    names, total = [*scorer_names(config.scoring), config.evaluation.judge], 0
    model = config.model
    shares = model.path == EMBEDDED and model.dtype == "float32" and (model.shard == 1 or not model.lora_rank)
    for name in names:
        if name == NONE or (FUNCTION.fullmatch(name) and not Path(name).exists()) or (name == EMBEDDED and shares):
            continue
        if name == EMBEDDED:
            return None
        try:
            total += _model_bytes(name.partition("#")[0], device, trust)
        except Exception:  # whatever it is, the run says it when it loads the scorer
            return None
    return total


def _model_bytes(path: str, device: str, trust: bool) -> int:
    """Compute the bytes of a model's weights, without its head, in the type in which a scorer is loaded."""
    shape = AutoConfig.from_pretrained(base_of(path, "scorer") or path, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModel.from_config(shape, trust_remote_code=trust)
    saved = getattr(shape, "dtype", None) or torch.float32
    element = 4 if device == "cpu" else saved.itemsize
    return element * sum(p.numel() for p in model.parameters())
