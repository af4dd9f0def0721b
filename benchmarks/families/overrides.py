"""Overrides: what the rules of tiny_config do not say of single families."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
