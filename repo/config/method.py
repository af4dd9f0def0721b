"""Method: what a configuration trains by, in a few words, for reports and model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .schema import PAIRED


def describe_method(config: Mapping[str, Any]) -> str:
    """Name the method, its form and what is switched on besides, as "repo (rectified, group, learned credit)".

    config: nested mappings; fields that older versions did not write may be missing.
    """
    algorithm, name = config["algorithm"], config["algorithm"]["method"]
    parts = list[str]()
    if name == "repo":
        mode = str(algorithm.get("cost_mode", algorithm.get("mode", "")))  # "mode" is the name that version 0.1 wrote
        margin = f", m = {algorithm['barrier_margin']:g}" if algorithm.get("barrier_margin") else ""
        parts.append(f"{mode} with τ = {algorithm['barrier_tau']:g}{margin}" if mode == "barrier" else mode)
    parts.append("pairs" if name in PAIRED else str(algorithm.get("advantages", "")))
    if algorithm.get("credit") == "redistributed":
        parts.append("learned credit")
    if (schedule := config.get("penalty", {}).get("limit_schedule", "constant")) != "constant":
        parts.append(f"limit by schedule {schedule}")
    if every := config.get("gate", {}).get("every"):
        parts.append(f"gate every {every} steps")
    return f"{name} ({', '.join(filter(None, parts))})"
