"""Options of an evaluation behind a shield, read without loading torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from ..common.errors import UserError

SHIELDED = "shield"
"""Prefix of the files of shielded evaluations, before the number of draws."""
Z = 1.64


@dataclass(frozen=True)
class ShieldSettings:
    """Settings of a shield; see repo.rollout.shield.Shield.

    samples: most draws per response. z: deviations added to the mean cost. refusal: text in place of what is not
    acceptable, or None. scorers: names of the cost scorers of the ensemble; () for scoring.cost alone.
    """

    samples: int
    z: float
    refusal: str | None
    scorers: tuple[str, ...]


def add_shield_switches(parser: argparse.ArgumentParser) -> None:
    """Add the switches of a shield to the parser of a command."""
    parser.add_argument(
        "--shield",
        type=int,
        metavar="N",
        help="filter: the first of up to N draws whose upper cost is within the limit",
    )
    parser.add_argument(
        "--shield-z", type=float, metavar="Z", help=f"deviations in the upper cost, mean + Z deviations; default: {Z}"
    )
    parser.add_argument(
        "--shield-refusal", metavar="TEXT", help="returned where no draw is; default: the draw of least upper cost"
    )
    parser.add_argument(
        "--shield-scorer",
        action="append",
        metavar="NAME",
        help="its cost scorers, several times for an ensemble; default: scoring.cost",
    )


def shield_of(options: argparse.Namespace) -> ShieldSettings | None:
    """Return the settings that the switches give, None without --shield. Raises UserError for a wrong value."""
    if options.shield is None:
        for name in ("shield_z", "shield_refusal", "shield_scorer"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} needs --shield N, the most draws per response")
        return None
    if options.shield < 1:
        raise UserError(f"--shield must be an integer >= 1; got {options.shield}")
    z = Z if options.shield_z is None else options.shield_z
    if not math.isfinite(z) or z < 0:
        raise UserError(f"--shield-z must be a finite number >= 0; got {z}")
    if options.shield_refusal is not None and not options.shield_refusal.strip():
        raise UserError("--shield-refusal must be a text that is not empty")
    scorers = tuple(options.shield_scorer or ())
    if repeated := next((name for name in scorers if scorers.count(name) > 1), None):
        raise UserError(f"--shield-scorer: {repeated!r} is given twice, which adds nothing to an ensemble")
    if "" in scorers:
        raise UserError("--shield-scorer must name a cost scorer; got ''")
    return ShieldSettings(options.shield, z, options.shield_refusal, scorers)
