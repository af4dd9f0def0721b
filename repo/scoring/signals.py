"""Signals: the configuration fields, and the option, that name the scorers of reward, cost, judge and shield."""

OTHERS = {"judge": "evaluation.judge", "shield": "--shield-scorer"}


def field_of(signal: str) -> str:
    """Return what names the scorer of `signal`, "reward", "cost", "judge" or "shield", in messages."""
    return OTHERS.get(signal, f"scoring.{signal}")
