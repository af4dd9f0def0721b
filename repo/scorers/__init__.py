"""Scorers of the user's own: models and Python functions, with the manifest that says what their numbers mean."""


def field_of(signal: str) -> str:
    """The configuration field that names the scorer of "reward", "cost" or "judge"."""
    return "evaluation.judge" if signal == "judge" else f"scoring.{signal}"
