"""RePO: align a language model under safety constraints. `python -m repo.train` runs it end to end."""

__version__ = "0.2.0.dev0"
