"""Configuration: small dataclasses with a docstring per field, which define the YAML format, the options and --help.

python -m repo.train --config run.yaml --optimizer.lr 1e-5 --steps 40
"""

from .algorithm import BOUNDED, DUAL_EVERY, PAIRED, AlgorithmConfig, CriticConfig, PenaltyConfig
from .data import DataConfig, PtxConfig
from .gate import GateConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .rollout import RolloutConfig
from .run import Config
from .scoring import EvaluationConfig, ScoringConfig

__all__ = [
    "BOUNDED",
    "DUAL_EVERY",
    "PAIRED",
    "AlgorithmConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PenaltyConfig",
    "PtxConfig",
    "RolloutConfig",
    "ScoringConfig",
]
