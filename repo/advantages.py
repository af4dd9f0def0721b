"""Old name of repo.training.advantages, kept for one release."""

import warnings

from .training.advantages import *  # noqa: F403

warnings.warn("repo.advantages is now repo.training.advantages", DeprecationWarning, stacklevel=2)
