"""Old name of repo.training.multipliers; goes with the next release."""

import warnings

from .training.multipliers import *  # noqa: F403

warnings.warn("repo.penalty is now repo.training.multipliers", DeprecationWarning, stacklevel=2)
