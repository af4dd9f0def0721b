"""Credit: which tokens of a response its cost came from, learned while a policy trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.distributed import ALONE, World
from ..common.errors import UserError, first_line
from ..config.schema import AlgorithmConfig
from ..data.sequences import Sequences
from ..data.token_ids import plain_ids
from ..scoring.embedded import Reading
from .lm_head import trunk_of
from .policy import Policy

ITERATIONS = 5  # Gauss-Newton steps on each batch
STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # parts of a Gauss-Newton step that the line search tries
LEAST_NOISE = 0.03  # observation noise: variance of the standardised cost that the weights need not explain
DECAY = 0.8  # of the moving averages of the squared error and the variance, from batch to batch
SPREAD = 128.0  # prior variance of w z_t: a token can be told from others, whatever the width of the states
DRIFT = 1e-3  # process noise, in parts of the prior variance: weights can follow a cost that changes, and the
# covariance stays positive definite
SILENT = 0.04  # sum of the softplus over a response of mean length, before anything is learned
WIDER = 2.0  # costs of so much more spread than the units are begin anew
LISTED = 3  # tokens with the largest shares, in samples.jsonl


@dataclass(frozen=True)
class TokenStates:
    """The reference's states at the tokens of responses.

    reading: states of this process's responses. rows: their places among the B of the batch; those of all processes
    follow each other. mask: (B, R) bool, true on the tokens of each response.
    """

    reading: Reading
    rows: range
    mask: Tensor

    def each(self, layers: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
        """Yield the place among this process's responses and the states (n, D) fp32 of each that has tokens.

        layers: whose states stand side by side.
        """
        for own, row in enumerate(self.rows):
            if length := int(self.mask[row].sum()):
                yield own, torch.cat([self.reading.states[layer][own][1 : length + 1] for layer in layers], 1)


class Credit:
    """A one-layer head that gives each token of a response its share of the cost: return redistribution.

        g_t = scale trust softplus(w z_t + b) >= 0

    z_t are two states of the frozen reference at the token, standardised: after the embedding, which tells the token,
    and after the middle layer, which tells its context. After each batch w and b are fitted to sum_t g_t = C - offset
    by an iterated extended Kalman filter: Gauss-Newton on the squared error, in which earlier batches stand as a
    Gaussian prior, so that none has to be kept. Offset and scale are the least cost and the standard deviation of a
    batch; they, the standardisation and the weights begin anew where costs turn out to spread twice as far. Learned
    credit for constraints: arXiv 2405.03005; return redistribution: RUDDER, arXiv 1806.07857. The head that cannot be
    negative and its fit are ours. The state is fp64 on the CPU.

    layers: the reference's layers that it reads, as indices into hidden_states.
    """

    def __init__(self, widths: tuple[int, int], layers: tuple[int, int], world: World = ALONE) -> None:
        """widths: of the states of both layers. layers: see the class. world: processes that share a batch."""
        self.layers, self.world, size = layers, world, sum(widths)
        self.weights = torch.zeros(size + 1, dtype=torch.float64)  # w, then b
        self.covariance = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        self.mean, self.inverse_deviation = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.units = torch.zeros(2, dtype=torch.float64)  # offset and scale; a scale of 0 before the first fit
        self.errors = torch.ones(2, dtype=torch.float64)  # moving averages: squared error of predictions, and variance

    @property
    def trust(self) -> float:
        """Return the part of the cost's variance that predictions of late have explained, in [0, 1]."""
        return float((1 - self.errors[0] / self.errors[1].clamp_min(1e-12)).clamp(0, 1))

    def shares(self, tokens: TokenStates) -> Tensor:
        """Compute g_t of every token, (B, R) fp32 in units of the cost, 0 outside the mask."""
        shares, factor = torch.zeros(len(tokens.rows), tokens.mask.shape[1]), float(self.units[1]) * self.trust
        for own, states in tokens.each(self.layers) if factor else ():
            shares[own, : len(states)] = (
                factor * torch.nn.functional.softplus(self._scores(states, self.weights)).float()
            )
        return torch.cat(self.world.gather(shares))

    def fit(self, tokens: TokenStates, costs: Tensor) -> None:
        """Learn from a batch. costs: (B,) of the responses, as the advantages take them.

        Responses without a token in the mask are left out. Nothing is learned before costs differ.
        """
        counted, costs = tokens.mask.any(1), costs.double()
        if not bool(counted.any()):
            return
        deviation = costs[counted].std(correction=0)
        if deviation > WIDER * self.units[1]:
            self._begin(tokens, torch.stack((costs[counted].min(), deviation)))
        if not self.units[1]:
            return
        wanted = torch.where(counted, (costs - self.units[0]) / self.units[1], 0.0)
        sums, slopes = self._linearise(tokens, self.weights)
        measured = torch.stack(((wanted - sums)[counted].square().mean(), wanted[counted].var(correction=0)))
        self.errors = DECAY * self.errors + (1 - DECAY) * measured
        noise = float(self.errors[0].clamp_min(LEAST_NOISE))
        self.covariance.diagonal().add_(DRIFT * self._prior())
        slopes = self._search(tokens, wanted, noise, sums, slopes)
        spread = slopes @ self.covariance
        self.covariance -= spread.T @ _solve(spread @ slopes.T, noise, spread)
        self.covariance = (self.covariance + self.covariance.T) / 2

    def _search(self, tokens: TokenStates, wanted: Tensor, noise: float, sums: Tensor, slopes: Tensor) -> Tensor:
        """Move the weights by Gauss-Newton steps, and return the slopes (B, D + 1) where they end.

        Each step goes as far as lowers |wanted - sums|^2 / noise + change^T covariance^-1 change. The first process
        decides, since rounding may differ between machines.

        wanted: (B,) standardised costs. sums, slopes: of the weights as they are, see `_linearise`.
        """
        start, pull = self.weights, torch.zeros_like(self.weights)  # pull = covariance^-1 (weights - start)

        def error(sums: Tensor, weights: Tensor, pull: Tensor) -> float:
            return float((wanted - sums).square().sum() / noise + (weights - start) @ pull)

        def towards(sums: Tensor, slopes: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
            spread = slopes @ self.covariance
            gain = _solve(spread @ slopes.T, noise, wanted - sums + slopes @ (self.weights - start))
            return start + spread.T @ gain - self.weights, slopes.T @ gain - pull

        for _ in range(ITERATIONS):
            step, pull_step = self.world.from_first(partial(towards, sums, slopes, pull))
            for part in STEPS:
                there, pull_there = self.weights + part * step, pull + part * pull_step
                sums_there, slopes_there = self._linearise(tokens, there)
                lower = error(sums_there, there, pull_there) <= error(sums, self.weights, pull)
                if self.world.gather(lower)[0]:
                    self.weights, pull, sums, slopes = there, pull_there, sums_there, slopes_there
                    break
            else:
                break
        return slopes

    def _begin(self, tokens: TokenStates, units: Tensor) -> None:
        """Forget what was learned, and standardise states by a batch. units: offset and scale of its costs."""
        moments = torch.zeros(3, len(self.mean), dtype=torch.float64)  # number, sum and sum of squares
        for _, states in tokens.each(self.layers):
            states = states.double()
            moments += torch.stack((torch.full_like(self.mean, len(states)), states.sum(0), states.square().sum(0)))
        count, total, squares = self.world.sum(moments)
        self.mean = total / count
        deviation = (squares / count - self.mean.square()).clamp_min(0).sqrt()
        self.inverse_deviation = 1 / (deviation + 1e-3 * deviation.mean() + 1e-12)
        self.units, self.errors = units, torch.ones(2, dtype=torch.float64)
        self.covariance = torch.diag(self._prior())
        self.weights = torch.zeros_like(self.weights)
        length = count[0] / tokens.mask.any(1).sum()
        self.weights[-1] = torch.log(torch.expm1(SILENT / length))  # the inverse of softplus

    def _prior(self) -> Tensor:
        """Return the prior variances (D + 1,): of each w, so that w z_t has SPREAD, and of b."""
        size = len(self.mean)
        return torch.cat((torch.full((size,), SPREAD / size, dtype=torch.float64), self.mean.new_ones(1)))

    def _scores(self, states: Tensor, weights: Tensor) -> Tensor:
        """Compute w z_t + b, (n,) fp64, of states (n, D), which are standardised by way of the weights."""
        scaled = weights[:-1] * self.inverse_deviation
        return (states @ scaled.float()).double() + (weights[-1] - self.mean @ scaled)

    def _linearise(self, tokens: TokenStates, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sum of the softplus over each of B responses, (B,), and its gradient by weights, (B, D + 1)."""
        own_sums = torch.zeros(len(tokens.rows), 1 + len(weights), dtype=torch.float64)
        for own, states in tokens.each(self.layers):
            scores = self._scores(states, weights)
            slopes = torch.sigmoid(scores)
            z = (slopes.float() @ states).double() - slopes.sum() * self.mean
            own_sums[own, 0] = torch.nn.functional.softplus(scores).sum()
            own_sums[own, 1:-1], own_sums[own, -1] = z * self.inverse_deviation, slopes.sum()
        both = torch.cat(self.world.gather(own_sums))
        return both[:, 0], both[:, 1:]

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint keeps, not copied: what is written into it is the state."""
        return {
            "weights": self.weights,
            "covariance": self.covariance,
            "mean": self.mean,
            "inverse_deviation": self.inverse_deviation,
            "units": self.units,
            "errors": self.errors,
        }


def _solve(matrix: Tensor, noise: float, right: Tensor) -> Tensor:
    """Solve (matrix + noise I) x = right, for a positive semidefinite matrix (B, B) and right (B,) or (B, n)."""
    factor = torch.linalg.cholesky(matrix + noise * torch.eye(len(matrix), dtype=matrix.dtype))
    columns = right if right.ndim == 2 else right[:, None]
    return torch.cholesky_solve(columns, factor).reshape(right.shape)


def costliest(shares: Tensor, sequences: Sequences, decode: Callable[[list[int]], str]) -> list[list[Any]]:
    """List, for each response, up to LISTED tokens with the largest shares of its cost, as [text, share].

    shares: (B, R) as `Credit.shares` returns them; those below a twentieth of the batch's largest are left out.
    decode: text of token ids.
    """
    found, least = [], shares.max().item() / 20
    for row, (_, ids) in zip(shares, sequences.token_lists(), strict=True):
        values, places = row[: len(ids)].topk(min(LISTED, len(ids)))
        pairs = zip(values.tolist(), places.tolist(), strict=True)
        found.append([[decode([ids[place]]), value] for value, place in pairs if value > least])
    return found


@torch.no_grad()
def make_credit(algorithm: AlgorithmConfig, reference: Policy, world: World = ALONE) -> Credit | None:
    """Return a head that has learned nothing yet, for algorithm.credit redistributed; else None.

    The reference reads a few tokens, which tells how many states it has and how wide they are. Raises UserError if it
    gives no states of its layers.
    """
    if algorithm.credit == "terminal":
        return None
    model = reference.model
    ids = plain_ids(model, 1, 5, "credit").to(reference.device)
    try:
        with reference.running():
            states = trunk_of(model)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        layers = (0, len(states) // 2)
        return Credit((states[layers[0]].shape[-1], states[layers[1]].shape[-1]), layers, world)
    except Exception as error:  # models raise errors of many types
        raise UserError(
            f"algorithm.credit: redistributed needs the states of every layer, which {type(model).__name__} does not "
            f"give: {first_line(error)}"
        ) from error
