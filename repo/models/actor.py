"""Actor: policy and critics as one module whose forward ends with what is made of the hidden states.

Losses and log-probabilities are formed inside the module, where the hooks of sharded and data-parallel training see the
LM head. Policy, sampling policy, reference and critics all run through it; only the readout at its end differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.distributed import ALONE, World
from ..data.micro_batches import divide, micro_batches
from ..data.packing import Packed, pack, pad, unflat
from ..data.sequences import Sequences
from ..scoring.embedded import Reading
from .attention import Attention
from .hidden_states import States, trunk_states
from .lm_head import lm_head
from .policy import Policy
from .sharding import shard

T = TypeVar("T")


class Actor(nn.Module):
    """A causal LM and its critics (none for a reference).

    attention: the policy's, or that of the first critic that cannot read the policy's layout. Where it packs, prompts
    and responses are laid end to end and a prompt is computed once for all its responses; otherwise they are padded.
    """

    attention: Attention

    def __init__(
        self, policy: Policy, critics: nn.ModuleDict | None = None, world: World = ALONE, shards: int = 1
    ) -> None:
        """shards: processes of `world` that split the trained weights among them; with 1 each has all of them."""
        super().__init__()
        self.settings, self.world, self.sharded = policy, world, shards > 1
        self.policy, self.critics = policy.model, nn.ModuleDict() if critics is None else critics
        choices: list[Any] = [policy.attention, *(c.attention for c in self.critics.values() if c.trunk is not None)]
        self.attention = next((choice for choice in choices if not choice.packs), choices[0])
        self.reads_layers = any(critic.trunk is None for critic in self.critics.values())
        if self.sharded:
            shard(self, self.critics.values(), shards, policy.device, policy.autocast)

    def forward(self, packed: Packed, readout: Callable[..., T], *arguments: Any, every_layer: bool = False) -> T:
        """Run the model on packed responses and return readout(states, critics, *arguments).

        readout: a module or function, e.g. training.loss.PolicyLoss. Sharded training needs the tensors of its result
        in tuples and dicts. every_layer: give it the states of every layer, not of the last alone.
        """
        with self.settings.running():
            hidden = trunk_states(self.policy.base_model, packed, every_layer or self.reads_layers)
        states = States(packed, hidden, lm_head(self.policy, self.settings.autocast))
        return readout(states, self.critics, *arguments)

    def parts(self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool = False) -> list[Packed]:
        """Lay out rows (n,) of a batch as forward passes of at most `budget` tokens, on the CPU.

        with_last: also read the last token of each response, see packing.pack.
        """
        return [self._layout(sequences, part, with_last) for part in self._cut(sequences, rows, budget, with_last)]

    def own_parts(self, sequences: Sequences, rows: Tensor, budget: int) -> list[Packed]:
        """Lay out this process's share of the rows, as at least one forward pass.

        All processes of a sharded run get equally many, since each forward and backward gathers weights: the last ones
        may be without responses.
        """
        if self.world.size == 1:
            return self.parts(sequences, rows, budget)
        divided = divide(sequences, rows, self.world.size)
        shares = [self._cut(sequences, share, budget, False) for share in divided]
        mine = shares[self.world.rank]
        idle = (max(len(share) for share in shares) if self.sharded else 1) - len(mine)
        nothing = dataclasses.replace(sequences, response_lengths=torch.zeros_like(sequences.response_lengths))
        laid_out = [self._layout(sequences, part, False) for part in mine]
        return laid_out + [self._layout(nothing, rows[:1], False)] * idle

    def _cut(self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool) -> list[Tensor]:
        return micro_batches(sequences, rows, budget, True, padded=not self.attention.packs, with_last=with_last)

    def _layout(self, sequences: Sequences, rows: Tensor, with_last: bool) -> Packed:
        return pack(sequences, rows, True, with_last) if self.attention.packs else pad(sequences, rows, with_last)


@dataclass(frozen=True)
class Predictions:
    """What policy and critics predict for the tokens of sampled responses.

    logps: (B, R) fp32 log-probabilities in nats, None where nothing needs them. values: by signal, (B, R) the critics'
    values. Both are 0 beyond each response and on rows that were left out.
    """

    logps: Tensor | None
    values: dict[str, Tensor]


def _logps_and_values(states: States, critics: nn.ModuleDict, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(N,) log-probabilities of the response tokens and, by signal, (N,) values."""
    return states.logps(temperature), {signal: critic(states) for signal, critic in critics.items()}


@torch.no_grad()
def predict(
    actor: Actor, sequences: Sequences, temperature: float, budget: int, rows: Tensor | None = None
) -> Predictions:
    """Compute log-probabilities and values of the response tokens of `rows` (n,), default all.

    budget: tokens of one forward pass at most. Processes share the work, and each gets the whole result.
    """
    shape = sequences.response_ids.shape
    logps, values = torch.zeros(shape), {signal: torch.zeros(shape) for signal in actor.critics}
    rows = torch.arange(shape[0]) if rows is None else rows
    for packed in actor.own_parts(sequences, rows, budget) if len(rows) else []:
        part_logps, part_values = actor(packed.to(actor.settings.device), _logps_and_values, temperature)
        unflat(packed, part_logps, logps)
        for signal, value in part_values.items():
            unflat(packed, value, values[signal])
    return Predictions(actor.world.sum(logps), {signal: actor.world.sum(value) for signal, value in values.items()})


def _logps_and_states(
    states: States, _: nn.ModuleDict, temperature: float, layers: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """(N,) log-probabilities at the temperature and at 1, and the states before and of each token, by layer."""
    tempered = states.logps(temperature)
    at_one = tempered if temperature == 1 else states.logps(1.0)
    return tempered, at_one, [(states.before(layer).cpu(), states.of(layer).cpu()) for layer in layers]


@torch.no_grad()
def read_reference(
    reference: Actor, sequences: Sequences, temperature: float, budget: int, layers: Sequence[int]
) -> tuple[Tensor, Reading | None]:
    """Compute the reference's log-probabilities (B, R), and keep its states for scorers that read `layers` of it.

    Returns the log-probabilities in nats and the Reading that scorers take, None where `layers` is empty.
    """
    if not layers:
        logps = predict(reference, sequences, temperature, budget).logps
        assert logps is not None
        return logps, None
    count = len(sequences.response_ids)
    logps, at_one = torch.zeros(sequences.response_ids.shape), torch.zeros(sequences.response_ids.shape)
    states: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * count for layer in layers}
    for packed in reference.parts(sequences, torch.arange(count), budget, with_last=True):
        part = packed.to(reference.settings.device)
        part_logps, part_at_one, by_layer = reference(part, _logps_and_states, temperature, layers, every_layer=True)
        unflat(packed, part_logps, logps)
        unflat(packed, part_at_one, at_one)
        for layer, (before, of) in zip(layers, by_layer, strict=True):
            pairs = zip(before.float().split(packed.lengths), of.float().split(packed.lengths), strict=True)
            for row, (prompt, response) in zip(packed.order.tolist(), pairs, strict=True):
                states[layer][row] = torch.cat((prompt[:1], response))
    return logps, Reading(reference.policy, sequences.token_lists(), states, list(at_one))
