"""RePO in TRL: `RePOTrainer` is GRPOTrainer with cost functions, a multiplier lambda and the losses of this library.

from repo_kernels.integrations.trl import RePOConfig, RePOTrainer
"""

try:
    import trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError("repo_kernels.integrations.trl needs TRL: pip install 'repo-rlhf[trl]'") from error

from .config import RePOConfig
from .trainer import RePOTrainer

__all__ = ["RePOConfig", "RePOTrainer"]
