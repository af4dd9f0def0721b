"""The library's own log-probabilities, in one call."""

from torch import Tensor

from repo.data.sequences import Sequences
from repo.models.actor import Actor, predict
from repo.models.policy import Policy


def response_logps(policy: Policy, sequences: Sequences, temperature: float, budget: int) -> Tensor:
    """(B, R) log-probabilities of the response tokens, by forward passes of at most `budget` tokens."""
    return predict(Actor(policy), sequences, temperature, budget).logps
