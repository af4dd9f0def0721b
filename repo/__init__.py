"""RePO: align a language model under safety constraints. `python -m repo.train` runs it end to end."""

from .common.openmp import spin_briefly

__version__ = "0.2.0.dev0"

spin_briefly()  # here, since torch reads its environment when it is loaded
