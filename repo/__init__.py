"""RePO: align a language model under safety constraints. `python -m repo.train` runs it end to end."""

from importlib.metadata import version

__version__: str


def __getattr__(name: str) -> str:
    """Read `__version__` from the installed package, where pyproject.toml has put it."""
    if name == "__version__":
        return version("repo-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
