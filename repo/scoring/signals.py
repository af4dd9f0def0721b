"""The signals of a run and the configuration fields that name their scorers."""


def field_of(signal: str) -> str:
    """The configuration field that names the scorer of "reward", "cost" or "judge"."""
    return "evaluation.judge" if signal == "judge" else f"scoring.{signal}"
