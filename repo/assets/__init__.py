"""Find or build the embedded default: policy, scorers, judge and prompts. `python -m repo.assets` builds it too."""

import os
from pathlib import Path

from .build import Report, build_folder, silent
from .sources import AssetError

__all__ = ["AssetError", "assets_dir", "build", "ensure"]


def assets_dir(override: str | Path | None = None) -> Path:
    """Return the assets folder: `override`, else the environment variable REPO_ASSETS, else ~/.cache/repo-assets."""
    chosen = override or os.environ.get("REPO_ASSETS") or "~/.cache/repo-assets"
    return Path(chosen).expanduser().absolute()


def build(override: str | Path | None = None, force: bool = False, report: Report = silent) -> bool:
    """Build the assets folder if it is missing or out of date; return whether it was built.

    override: the folder; None for the default of assets_dir.
    force: build even if the folder is current.
    report: called as report(step, done, total) to show progress.

    Raises AssetError if a package is missing or altered.
    """
    return build_folder(assets_dir(override), force, report)


def ensure(override: str | Path | None = None) -> Path:
    """Return the assets folder, after building it if it is missing or out of date."""
    build(override)
    return assets_dir(override)
