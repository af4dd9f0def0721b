"""Old name of repo.training.multipliers, kept for one release."""

import warnings

from .training.multipliers import *  # noqa: F403
from .training.multipliers import Multipliers as Penalty  # noqa: F401

warnings.warn("repo.penalty is now repo.training.multipliers", DeprecationWarning, stacklevel=2)
