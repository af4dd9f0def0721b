"""The embedded default's assets: where they are, and building them (`python -m repo.assets`)."""

import os
from pathlib import Path

from .build import Report, build_folder, silent
from .sources import AssetError

__all__ = ["AssetError", "assets_dir", "build", "ensure"]


def assets_dir(override: str | Path | None = None) -> Path:
    """The assets folder: the argument, else the environment variable REPO_ASSETS, else a cache folder."""
    chosen = override or os.environ.get("REPO_ASSETS") or "~/.cache/repo-assets"
    return Path(chosen).expanduser().absolute()


def build(override: str | Path | None = None, force: bool = False, report: Report = silent) -> bool:
    """Build the assets folder unless it is current (always if `force`); returns whether it was built.

    `report(step, done, total)` is called as the build goes on.
    """
    return build_folder(assets_dir(override), force, report)


def ensure(override: str | Path | None = None) -> Path:
    """The assets folder, built first if it is missing or out of date; returns at once otherwise."""
    build(override)
    return assets_dir(override)
