"""Obstacles: say in a sentence when a run cannot learn what it is meant to, from the lines that its steps wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.schema import BOUNDED, PAIRED

FEWEST = 4
"""Fewest steps that a sentence is based on."""
CUT_OFF = 0.95
"""Share of responses cut off from which a sentence says so."""
FLAT = 0.501
"""Mean probability that the better response of a pair is better, below which the pairs teach nothing."""


def obstacles(config: Mapping[str, Any], records: Sequence[Mapping], samples: Sequence[Mapping]) -> dict[str, str]:
    """Find what keeps a run from learning, in all of the given steps.

    config: the configuration as nested mappings. records, samples: lines of metrics.jsonl and samples.jsonl of the same
    steps; keys that older versions did not write may be missing.
    Returns a sentence for each kind of obstacle, by its name; none before FEWEST steps, with methods that learn from
    pairs FEWEST of those that sampled the policy.
    """
    algorithm, found = config["algorithm"], dict[str, str]()
    confidence = _values(records, "pair_confidence")
    if len(confidence) >= FEWEST and max(confidence) < FLAT:
        found["no spread"] = (
            f"the two responses of nearly every pair of {len(confidence)} steps are worth the same, so that nothing is "
            "learned from them: do the scores differ?"
        )
    if algorithm["method"] in PAIRED:
        records = [record for record in records if record.get("safe_rate") is not None]
    if len(records) < FEWEST:
        return found
    constrained, steps = algorithm["method"] != "ppo", f"{len(records)} steps"
    safe = _values(records, "safe_rate")
    hinged = algorithm["method"] == "repo" and algorithm.get("cost_mode") != "barrier"
    vanishes = hinged or algorithm["method"] == "crpo"  # other costs act within the limit too
    if vanishes and safe and min(safe) == 1:
        found["never binds"] = (
            f"every response of {steps} is within the limit d = {algorithm['cost_limit']:g}, so that the cost has no "
            "effect: this is plain PPO. Is the cost's sign or the limit right?"
        )
    if constrained and safe and max(safe) == 0:
        found["nothing safe"] = (
            f"no response of {steps} is within the limit d = {algorithm['cost_limit']:g}. Is the cost's sign or the "
            "limit right?"
        )
    groups = _groups(samples)
    if algorithm.get("advantages") == "group" and groups and all(len(values) > 1 for values in groups):
        flat = sum(not any(values) for values in groups) / len(groups)
        if flat >= CUT_OFF:
            found["no spread"] = (
                f"in {flat:.0%} of the groups of {steps} all responses to the prompt have the same advantage 0: their "
                "scores do not differ, so that nothing is learned from them"
            )
    lam, cap = _values(records[-FEWEST:], "lam"), config.get("penalty", {}).get("max")
    bounded = algorithm["method"] in BOUNDED and cap is not None
    if bounded and len(lam) == FEWEST and min(lam) >= cap > 0:
        found["lambda at its cap"] = (
            f"lambda has been at its cap penalty.max = {cap:g} for {FEWEST} steps: the cost weighs no more than that, "
            "however unsafe the responses are"
        )
    cut = _values(records, "truncated")
    if cut and sum(cut) / len(cut) >= CUT_OFF:
        limit = config.get("rollout", {}).get("max_response_tokens")
        found["cut off"] = (
            f"{sum(cut) / len(cut):.0%} of the responses of {steps} are cut off at rollout.max_response_tokens = "
            f"{limit}: the scorers see beginnings of answers only"
        )
    return found


def _values(records: Sequence[Mapping], key: str) -> list[float]:
    """Return a metric of all records, without those that lack it."""
    values = (record.get(key) for record in records)
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def _groups(samples: Sequence[Mapping]) -> list[list[float]]:
    """Return the advantages of each prompt's responses in each step."""
    groups: dict[tuple[int, str], list[float]] = {}
    for sample in samples:
        if sample.get("advantage") is not None:
            groups.setdefault((sample["step"], sample["id"]), []).append(sample["advantage"])
    return list(groups.values())
