"""Hub: find out whether a model or data set exists, since a library would retry a mistyped name for a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import UserError, first_line

PATIENCE = 10.0
"""Seconds that the hub may take to answer."""


def require_model(name: str, field: str) -> None:
    """Raise UserError unless `name` is a folder, in the hub's cache, or a model on the hub.

    A name that can only be a path is not looked up: one that begins with / . or ~, or has more than one slash.

    name: folder or hub name. field: the field or option that gives it, for the message.
    """
    if Path(name).exists():
        return
    if name.startswith(("/", ".", "~")) or name.count("/") != name.strip("/").count("/") or name.count("/") > 1:
        raise UserError(f"{field}: no such folder: {name!r}")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def is_cached() -> bool:
        try:
            return isinstance(try_to_load_from_cache(name, "config.json"), str)
        except HFValidationError:
            raise UserError(f"{field}: no such folder: {name!r}") from None

    _require(name, field, "model", is_cached, lambda: HfApi().model_info(name, timeout=PATIENCE))


def require_data_set(name: str) -> None:
    """Raise UserError unless `name`, which is no path, is a data set in the cache of datasets or on the hub."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import HfApi

    def is_cached() -> bool:
        owner, _, own = name.rpartition("/")
        folder = f"{owner}___{camelcase_to_snakecase(own)}"
        return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()

    _require(name, "prompts", "data set", is_cached, lambda: HfApi().dataset_info(name, timeout=PATIENCE))


def _require(name: str, field: str, kind: str, is_cached: Callable[[], bool], look_up: Callable[[], object]) -> None:
    """Raise UserError, after one question to the hub, unless the name is cached or on the hub.

    kind: what the name stands for, for the message. look_up: asks the hub for it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if is_cached():
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{field}: no such folder: {name!r}, nor is it in the hub's cache (HF_HUB_OFFLINE is set)")
    try:
        look_up()
    except HFValidationError:
        raise UserError(f"{field}: no such folder: {name!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{field}: no such folder, and no such {kind} on the hub: {name!r}") from None
    except Exception as error:  # a proxy or a mirror fails in many ways
        reason = first_line(error)
        raise UserError(f"{field}: no such folder: {name!r}, and the hub does not answer ({reason})") from error
