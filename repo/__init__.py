"""RePO: align a language model under safety constraints. `python -m repo.train` runs it end to end."""

from .common.openmp import spin_briefly

__version__: str

spin_briefly()  # here, since torch reads its environment when it is loaded


def __getattr__(name: str) -> str:
    """Read `__version__` from the installed package, where pyproject.toml has put it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("repo-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
