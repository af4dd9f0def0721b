"""Signals: the configuration fields that name the scorers of reward, cost and judge."""


def field_of(signal: str) -> str:
    """Return the configuration field that names the scorer of `signal`: "reward", "cost" or "judge"."""
    return "evaluation.judge" if signal == "judge" else f"scoring.{signal}"
