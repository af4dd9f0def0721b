"""Actor: policy and critics as one module, whose forward ends with what a reader makes of the states.

The loss is formed inside the module, where hooks of sharded and data-parallel training see the LM head. Policy, old
policy, reference and critics all run through it; only the reader differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.distributed import ALONE, World
from ..data.packing import Packed, micro_batches, pack, pad, unflat
from ..data.sequences import Sequences
from ..scoring.embedded import Reading
from .attention import Attention
from .hidden_states import States, lm_head, trunk_states
from .policy import Policy
from .sharding import shard

T = TypeVar("T")
Reader = Callable[[States, nn.ModuleDict], T]


class Actor(nn.Module):
    """A causal LM and its critics (none for a reference).

    attention: of the policy, or of the first critic that cannot read what it reads. Where it packs, prompts and
    responses are laid end to end and a prompt is computed once for all its responses; else they are padded.
    """

    attention: Attention

    def __init__(
        self, policy: Policy, critics: nn.ModuleDict | None = None, world: World = ALONE, shards: int = 1
    ) -> None:
        """shards: processes of `world` over which trained weights are split; with 1 each has all of them."""
        super().__init__()
        self.settings, self.world, self.sharded = policy, world, shards > 1
        self.policy, self.critics = policy.model, nn.ModuleDict() if critics is None else critics
        choices: list[Any] = [policy.attention, *(c.attention for c in self.critics.values() if c.trunk is not None)]
        self.attention = next((choice for choice in choices if not choice.packs), choices[0])
        self.reads_layers = any(critic.trunk is None for critic in self.critics.values())
        if self.sharded:
            shard(self, self.critics.values(), shards, policy.device, policy.autocast)

    def forward(self, packed: Packed, read: Reader[T], layers: bool = False) -> T:
        """What `read` makes of the states of packed responses; layers: of every layer, not the last alone."""
        with self.settings.running():
            hidden = trunk_states(self.policy.base_model, packed, layers or self.reads_layers)
        return read(States(packed, hidden, lm_head(self.policy, self.settings.autocast)), self.critics)

    def parts(self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool = False) -> list[Packed]:
        """Rows (n,) of a batch in layouts of at most `budget` tokens, on the CPU. with_last: see packing.pack."""
        return [self._layout(sequences, part, with_last) for part in self._cut(sequences, rows, budget, with_last)]

    def own_parts(self, sequences: Sequences, rows: Tensor, budget: int) -> list[Packed]:
        """This process's share of them, at least one. All processes of a sharded run have equally many, since each
        forward and backward gathers weights: the last ones may be without responses."""
        if self.world.size == 1:
            return self.parts(sequences, rows, budget)
        shares = [self._cut(sequences, share, budget, False) for share in self.world.divide(sequences, rows)]
        mine = shares[self.world.rank]
        idle = (max(len(share) for share in shares) if self.sharded else 1) - len(mine)
        nothing = dataclasses.replace(sequences, response_lengths=torch.zeros_like(sequences.response_lengths))
        laid = [self._layout(sequences, part, False) for part in mine]
        return laid + [self._layout(nothing, rows[:1], False)] * idle

    def _cut(self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool) -> list[Tensor]:
        return micro_batches(sequences, rows, budget, True, padded=not self.attention.packs, with_last=with_last)

    def _layout(self, sequences: Sequences, rows: Tensor, with_last: bool) -> Packed:
        return pack(sequences, rows, True, with_last) if self.attention.packs else pad(sequences, rows, with_last)


@torch.no_grad()
def read_responses(
    actor: Actor, sequences: Sequences, temperature: float, budget: int, rows: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, R) fp32 log-probabilities of response tokens and, by signal, the critics' values, all 0 beyond each response
    and outside `rows` (n,). budget: tokens of one forward pass at most. Processes share the work and the result."""
    shape = sequences.response_ids.shape
    logps, values = torch.zeros(shape), {signal: torch.zeros(shape) for signal in actor.critics}

    def read(states: States, critics: nn.ModuleDict) -> tuple[Tensor, dict[str, Tensor]]:
        return states.logps(temperature), {signal: critic(states) for signal, critic in critics.items()}

    rows = torch.arange(shape[0]) if rows is None else rows
    for packed in actor.own_parts(sequences, rows, budget) if len(rows) else []:
        found, said = actor(packed.to(actor.settings.device), read)
        unflat(packed, found, logps)
        for signal, value in said.items():
            unflat(packed, value, values[signal])
    return actor.world.sum(logps), {signal: actor.world.sum(value) for signal, value in values.items()}


def response_logps(policy: Policy, sequences: Sequences, temperature: float, budget: int) -> Tensor:
    """(B, R) fp32 log-probabilities of response tokens, 0 beyond each response; forward passes of <= budget tokens."""
    return read_responses(Actor(policy), sequences, temperature, budget)[0]


@torch.no_grad()
def read_reference(
    reference: Actor, sequences: Sequences, temperature: float, budget: int, layers: Sequence[int]
) -> tuple[Tensor, Reading | None]:
    """(B, R) log-probabilities of response tokens, and what the same forward tells scorers that read states of `layers`
    of this model: None where there are no such layers."""
    if not layers:
        return read_responses(reference, sequences, temperature, budget)[0], None
    count = len(sequences.response_ids)
    logps, plain = torch.zeros(sequences.response_ids.shape), torch.zeros(sequences.response_ids.shape)
    found: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * count for layer in layers}

    def read(states: States, _: nn.ModuleDict) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        tempered = states.logps(temperature)
        at_one = tempered if temperature == 1 else states.logps(1.0)
        return tempered, at_one, [(states.before(layer).cpu(), states.of(layer).cpu()) for layer in layers]

    for packed in reference.parts(sequences, torch.arange(count), budget, with_last=True):
        tempered, at_one, read_states = reference(packed.to(reference.settings.device), read, layers=True)
        unflat(packed, tempered, logps)
        unflat(packed, at_one, plain)
        for layer, (before, of) in zip(layers, read_states, strict=True):
            pairs = zip(before.float().split(packed.lengths), of.float().split(packed.lengths), strict=True)
            for row, (prompt, response) in zip(packed.order.tolist(), pairs, strict=True):
                found[layer][row] = torch.cat((prompt[:1], response))
    return logps, Reading(reference.policy, sequences.token_lists(), found, list(plain))
