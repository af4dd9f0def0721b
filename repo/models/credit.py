"""Credit: which tokens of a response its cost came from, learned while a policy trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.distributed import ALONE, World
from ..config.schema import AlgorithmConfig
from ..data.sequences import Sequences
from ..scoring.embedded import Reading
from .policy import Policy

ITERATIONS = 5  # Gauss-Newton steps on each batch
LEAST_NOISE = 0.03  # variance of the standardised cost that the weights need not explain
MEMORY = 0.8  # of the running error of the predictions, from batch to batch
DRIFT = 1e-3  # by which each batch raises the variance of every weight, so that it can follow a changing cost
SILENT = -6.0  # first value of the bias: softplus(-6) = 0.0025, so that no token costs anything until one is found
LISTED = 3  # tokens with the largest shares, in samples.jsonl


class Credit:
    """A one-layer head that gives each token of a response its share of the cost.

        g_t = scale softplus(w z_t + b) >= 0

    z_t are two states of the frozen reference at the token, standardised over the first batch: after the embedding,
    which tells the token, and after the middle layer, which tells its context. The weights are fitted to
    sum_t g_t = C - offset by an iterated extended Kalman filter, the recursive form of Gauss-Newton for the squared
    error over all batches so far, so that no batch has to be kept. Offset and scale are the least cost and the
    standard deviation of the first batch whose costs differ. Learned credit: arXiv 2405.03005; the head that cannot be
    negative and its fit are ours. All numbers are fp64 on the CPU.

    layers: the reference's layers that it reads, as indices into hidden_states.
    """

    def __init__(self, hidden: int, depth: int, world: World = ALONE) -> None:
        """hidden: width of the states. depth: number of the reference's layers. world: processes that share a batch."""
        self.layers, self.world, size = (0, (depth + 1) // 2), world, 2 * hidden
        self.weights = torch.zeros(size + 1, dtype=torch.float64)  # w, then b
        self.weights[-1] = SILENT
        self.covariance = torch.eye(size + 1, dtype=torch.float64)
        self.mean, self.inverse_deviation = torch.zeros(2, size, dtype=torch.float64)
        self.units = torch.zeros(2, dtype=torch.float64)  # offset and scale; a scale of 0 before the first fit
        self.errors = torch.ones(2, dtype=torch.float64)  # running squared error of predictions, and running variance

    @property
    def trust(self) -> Tensor:
        """Return the part of the cost's variance that predictions of late have explained, in [0, 1]."""
        return (1 - self.errors[0] / self.errors[1].clamp_min(1e-12)).clamp(0, 1)

    def shares(self, reading: Reading, rows: range, mask: Tensor) -> Tensor:
        """Compute g_t of every token, (B, R) fp32 in units of the cost, 0 outside the mask.

        reading: states of this process's responses. rows: their places among the B of the batch. mask: (B, R) bool,
        true on the tokens of each response.
        """
        shares = torch.zeros(mask.shape, dtype=torch.float64)
        scale = self.units[1] * self.trust
        for row, states in self._standardised(reading, rows, mask) if scale else ():
            shares[row, : len(states)] = scale * torch.nn.functional.softplus(states @ self.weights)
        return self.world.sum(shares).float()

    def fit(self, reading: Reading, rows: range, mask: Tensor, costs: Tensor) -> None:
        """Learn from a batch. costs: (B,) of the responses, as the advantages take them; the rest as in `shares`.

        Responses without a token in the mask are left out. Nothing is learned before costs differ.
        """
        counted = mask.any(1)
        if not self.units[1] and not self._begin(reading, rows, mask, costs[counted].double()):
            return
        wanted = torch.where(counted, (costs.double() - self.units[0]) / self.units[1], 0.0)
        batch = reading, rows, mask
        self.covariance.diagonal().add_(DRIFT)
        start, prior = self.weights, torch.zeros_like(self.weights)  # prior is covariance^-1 (weights - start)
        total, slopes = self._linearise(*batch, start)
        missed = torch.stack(((wanted - total)[counted].square().mean(), wanted[counted].var(correction=0)))
        self.errors = MEMORY * self.errors + (1 - MEMORY) * missed
        noise = self.errors[0].clamp_min(LEAST_NOISE)
        for _ in range(ITERATIONS):
            spread = slopes @ self.covariance
            gain = self._solve(spread @ slopes.T, noise, wanted - total + slopes @ (self.weights - start))
            step, prior_step = start + spread.T @ gain - self.weights, slopes.T @ gain - prior
            before = self._error(noise, wanted - total, self.weights - start, prior)
            for factor in (1.0, 0.5, 0.25, 0.125, 0.0625):
                weights, prior_there = self.weights + factor * step, prior + factor * prior_step
                total_there, slopes_there = self._linearise(*batch, weights)
                if self._error(noise, wanted - total_there, weights - start, prior_there) <= before:
                    self.weights, prior, total, slopes = weights, prior_there, total_there, slopes_there
                    break
            else:
                break
        spread = slopes @ self.covariance
        self.covariance -= spread.T @ self._solve(spread @ slopes.T, noise, spread)
        self.covariance = (self.covariance + self.covariance.T) / 2

    def _begin(self, reading: Reading, rows: range, mask: Tensor, costs: Tensor) -> bool:
        """Set the units of the cost and the standardisation of the states by a batch; tell whether its costs differ."""
        scale = costs.std(correction=0) if len(costs) else torch.zeros(())
        if not scale:
            return False
        self.units = torch.stack((costs.min(), scale))
        moments = torch.zeros(3, len(self.mean), dtype=torch.float64)  # number, sum and sum of squares
        for _, states in self._states(reading, rows, mask):
            moments += torch.stack((torch.full_like(self.mean, len(states)), states.sum(0), states.square().sum(0)))
        count, total, squares = self.world.sum(moments)
        self.mean = total / count
        deviation = (squares / count - self.mean.square()).clamp_min(0).sqrt()
        self.inverse_deviation = 1 / (deviation + 1e-3 * deviation.mean() + 1e-12)
        return True

    def _states(self, reading: Reading, rows: range, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the place in the batch and the states (n, D) fp64 of each of this process's responses."""
        for own, row in enumerate(rows):
            if length := int(mask[row].sum()):
                parts = [reading.states[layer][own][1 : length + 1] for layer in self.layers]
                yield row, torch.cat(parts, 1).double()

    def _standardised(self, reading: Reading, rows: range, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the same with standardised states and a column of ones, (n, D + 1)."""
        for row, states in self._states(reading, rows, mask):
            z = (states - self.mean) * self.inverse_deviation
            yield row, torch.cat((z, z.new_ones(len(z), 1)), 1)

    def _linearise(self, reading: Reading, rows: range, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute sum_t g_t / scale of all B responses, (B,), and its gradient by the weights, (B, D + 1)."""
        both = torch.zeros(len(mask), 1 + len(weights), dtype=torch.float64)
        for row, z in self._standardised(reading, rows, mask):
            u = z @ weights
            both[row, 0], both[row, 1:] = torch.nn.functional.softplus(u).sum(), torch.sigmoid(u) @ z
        both = self.world.sum(both)
        return both[:, 0], both[:, 1:]

    @staticmethod
    def _error(noise: Tensor, residual: Tensor, change: Tensor, prior: Tensor) -> Tensor:
        """Compute what a fit makes small: the squared error of the batch, and how far the weights are from before."""
        return residual @ residual / noise + change @ prior

    @staticmethod
    def _solve(matrix: Tensor, noise: Tensor, right: Tensor) -> Tensor:
        """Solve (matrix + noise I) x = right."""
        return torch.linalg.solve(matrix + noise * torch.eye(len(matrix), dtype=matrix.dtype), right)

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


def make_credit(algorithm: AlgorithmConfig, reference: Policy, world: World = ALONE) -> Credit | None:
    """Return a head that has learned nothing yet, for algorithm.credit redistributed; else None."""
    if algorithm.credit == "terminal":
        return None
    shape = reference.model.config.get_text_config()
    return Credit(shape.hidden_size, shape.num_hidden_layers, world)
