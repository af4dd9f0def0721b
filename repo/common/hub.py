"""Hub: find out before loading whether a model exists, since a library would retry a mistyped name for a minute."""

from __future__ import annotations

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
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{field}: no such folder: {name!r}, nor is it in the hub's cache (HF_HUB_OFFLINE is set)")
        HfApi().model_info(name, timeout=PATIENCE)
    except HFValidationError:
        raise UserError(f"{field}: no such folder: {name!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{field}: no such folder, and no such model on the hub: {name!r}") from None
    except UserError:
        raise
    except Exception as error:  # a proxy or a mirror fails in many ways
        reason = first_line(error)
        raise UserError(f"{field}: no such folder: {name!r}, and the hub does not answer ({reason})") from error
