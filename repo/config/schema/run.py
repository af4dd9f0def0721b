"""Configuration of one run: the groups of fields and those of no group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from .algorithm import AlgorithmConfig, CriticConfig, PenaltyConfig
from .data import DataConfig, PtxConfig
from .gate import GateConfig
from .model import ModelConfig
from .optimizer import OptimizerConfig
from .rollout import RolloutConfig
from .scoring import EvaluationConfig, ScoringConfig


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    out: str | None = None
    """Run folder to create; it must not exist. null: runs/<method>-<date>-<time>."""
    steps: PositiveInt = 18
    """Number of steps; each samples and trains on one rollout batch."""
    save_every: NonNegativeInt = 10
    """Number of steps between checkpoints; one is always saved at the end. 0: only that one."""
    keep: PositiveInt = 1
    """Number of newest checkpoints to keep. The best one is kept too: the highest mean reward among those that reach
    safety_target, and that the gate accepted if there is one."""
    safety_target: ClosedUnitInterval = 0.95
    """Safe rate, over the steps since the checkpoint before, that a checkpoint needs to be the best by reward. If none
    reaches it, the safest is the best."""
    seed: NonNegativeInt = 0
    """Seed of the order of prompts, the sampling of responses and the shuffling of minibatches."""
    sample_every: NonNegativeInt = 5
    """Number of steps between samples shown in the console. 0: show none. samples.jsonl always holds all of them."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Loggers that get the metrics besides metrics.jsonl; each needs its package. $WANDB_PROJECT and $TRACKIO_PROJECT
    name the project. []: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
