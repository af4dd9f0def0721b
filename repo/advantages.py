"""Old name of repo.training.advantages; goes with the next release."""

import warnings

from .training.advantages import *  # noqa: F403

warnings.warn("repo.advantages is now repo.training.advantages", DeprecationWarning, stacklevel=2)
