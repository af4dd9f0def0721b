"""Actor: policy and critics in one module, whose forward ends with a readout of the hidden states.

The readout, e.g. a loss or log-probabilities, runs inside the module, because only there do the hooks of sharded
training gather the weights of the LM head. Policy, reference and critics all run through an Actor; they differ in the
readout.
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
from .hidden_states import States, trunk_states
from .layout import Attention
from .lm_head import lm_head, trunk_of
from .policy import Policy
from .sharding import shard

T = TypeVar("T")


class Actor(nn.Module):
    """A causal LM and its critics; a reference has none.

    lm: the model as it was loaded, with its tokenizer and device; its module is `policy`.
    attention: the policy's attention, or that of the first model, policy or critic, that cannot read packed rows. If it
    packs, prompts and responses are laid end to end and a prompt is computed once for all its responses; else they are
    padded, or read one at a time.
    """

    attention: Attention

    def __init__(
        self, policy: Policy, critics: nn.ModuleDict | None = None, world: World = ALONE, shards: int = 1
    ) -> None:
        """critics: signal -> Critic, None for none. shards: processes that split one copy of the trained weights."""
        super().__init__()
        self.lm, self.world, self.sharded = policy, world, shards > 1
        self.policy, self.critics = policy.model, nn.ModuleDict() if critics is None else critics
        choices: list[Any] = [policy.attention, *(c.attention for c in self.critics.values() if c.trunk is not None)]
        self.attention = min(choices, key=lambda choice: (choice.packs, choice.pads))
        self.reads_layers = any(critic.trunk is None for critic in self.critics.values())
        if self.sharded:
            shard(self, self.critics.values(), shards, policy.device, policy.autocast)

    def forward(self, packed: Packed, readout: Callable[..., T], *arguments: Any, every_layer: bool = False) -> T:
        """Run the model on packed responses and return readout(states, critics, *arguments).

        readout: a module or function, e.g. training.loss.PolicyLoss. Its result is a tensor, or tensors in tuples and
        dicts, where sharded training looks for them. every_layer: give it the states of every layer, not only the last.
        """
        with self.lm.running():
            layers = every_layer or self.reads_layers
            hidden = trunk_states(trunk_of(self.policy), packed, layers, self.lm.attention.kernel)
        states = States(packed, hidden, lm_head(self.policy, self.lm.autocast))
        return readout(states, self.critics, *arguments)

    def parts(self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool = False) -> list[Packed]:
        """Lay rows (n,) of a batch out as forward passes of at most `budget` tokens, on the CPU.

        with_last: make the last token of each response an input too, so that its state can be read.
        """
        return [self._layout(sequences, part, with_last) for part in self._cut(sequences, rows, budget, with_last)]

    def own_parts(self, sequences: Sequences, rows: Tensor, budget: int, whole: bool = False) -> list[Packed]:
        """Lay this process's share of rows (n,) out as forward passes of at most `budget` tokens, at least one.

        In a sharded run all processes get equally many passes, because each pass gathers weights from all of them; the
        last passes of a process may hold no response tokens.

        whole: rows of one group stay in one pass, also where they exceed the budget.
        """
        if self.world.size == 1:
            return [self._layout(sequences, part, False) for part in self._cut(sequences, rows, budget, False, whole)]
        divided = divide(sequences, rows, self.world.size, whole)
        shares = [self._cut(sequences, share, budget, False, whole) for share in divided]
        mine = shares[self.world.rank]
        idle = (max(len(share) for share in shares) if self.sharded else 1) - len(mine)
        nothing = dataclasses.replace(sequences, response_lengths=torch.zeros_like(sequences.response_lengths))
        laid_out = [self._layout(sequences, part, False) for part in mine]
        return laid_out + [self._layout(nothing, rows[:1], False)] * idle

    def _cut(
        self, sequences: Sequences, rows: Tensor, budget: int, with_last: bool, whole: bool = False
    ) -> list[Tensor]:
        packs, pads = self.attention.packs, self.attention.pads
        budget = budget if packs or pads else 0  # a row that exceeds the budget gets a pass of its own
        return micro_batches(sequences, rows, budget, True, padded=not packs, with_last=with_last, whole=whole)

    def _layout(self, sequences: Sequences, rows: Tensor, with_last: bool) -> Packed:
        return pack(sequences, rows, True, with_last) if self.attention.packs else pad(sequences, rows, with_last)


@dataclass(frozen=True)
class Predictions:
    """The policy's log-probabilities and the critics' values for the tokens of sampled responses.

    logps: (B, R) fp32 in nats; None where nothing needs them. values: signal -> (B, R) fp32.
    Both are 0 after each response's end and on rows that were left out.
    """

    logps: Tensor | None
    values: dict[str, Tensor]


def _logps_and_values(states: States, critics: nn.ModuleDict, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the log-probabilities (N,) of the response tokens and, for each signal, the values (N,)."""
    return states.logps(temperature), {signal: critic(states) for signal, critic in critics.items()}


@torch.no_grad()
def predict(
    actor: Actor, sequences: Sequences, temperature: float, budget: int, rows: Tensor | None = None
) -> Predictions:
    """Compute log-probabilities and values of the response tokens. Processes share the work; each gets all results.

    temperature: divides the logits. budget: token limit of one forward pass. rows: (n,) rows of the batch to compute;
    None: all.
    """
    shape = sequences.response_ids.shape
    logps, values = torch.zeros(shape), {signal: torch.zeros(shape) for signal in actor.critics}
    rows = torch.arange(shape[0]) if rows is None else rows
    for packed in actor.own_parts(sequences, rows, budget) if len(rows) else []:
        part_logps, part_values = actor(packed.to(actor.lm.device), _logps_and_values, temperature)
        unflat(packed, part_logps, logps)
        for signal, value in part_values.items():
            unflat(packed, value, values[signal])
    return Predictions(actor.world.sum(logps), {signal: actor.world.sum(value) for signal, value in values.items()})


def _logps_and_states(
    states: States, _: nn.ModuleDict, temperature: float, layers: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Compute log-probabilities (N,) at the temperature and at 1, and select states on the CPU.

    Returns, besides both, (states that predict each response token, states of each response token) for each layer.
    """
    tempered = states.logps(temperature)
    at_one = tempered if temperature == 1 else states.logps(1.0)
    return tempered, at_one, [(states.before(layer).cpu(), states.of(layer).cpu()) for layer in layers]


@torch.no_grad()
def read_reference(
    reference: Actor,
    sequences: Sequences,
    temperature: float,
    budget: int,
    layers: Sequence[int],
    at_one: bool = False,
) -> tuple[Tensor, Reading | None]:
    """Compute the reference's log-probabilities, and keep its states for scorers that read `layers` of it.

    temperature: divides the logits. budget: token limit of one forward pass. layers: indices into hidden_states.
    at_one: return a Reading even if `layers` is empty, for its log-probabilities at temperature 1.
    Returns the log-probabilities (B, R) fp32 in nats, and the Reading for scorers, None if `layers` is empty and
    `at_one` is false.
    """
    if not layers and not at_one:
        logps = predict(reference, sequences, temperature, budget).logps
        assert logps is not None
        return logps, None
    count = len(sequences.response_ids)
    logps, plain = torch.zeros(sequences.response_ids.shape), torch.zeros(sequences.response_ids.shape)
    reads = bool(layers)
    states: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * count for layer in layers}
    for packed in reference.parts(sequences, torch.arange(count), budget, with_last=reads):
        part = packed.to(reference.lm.device)
        part_logps, part_plain, by_layer = reference(part, _logps_and_states, temperature, layers, every_layer=reads)
        unflat(packed, part_logps, logps)
        unflat(packed, part_plain, plain)
        for layer, (before, of) in zip(layers, by_layer, strict=True):
            pairs = zip(before.float().split(packed.lengths), of.float().split(packed.lengths), strict=True)
            for row, (prompt, response) in zip(packed.order.tolist(), pairs, strict=True):
                states[layer][row] = torch.cat((prompt[:1], response))
    return logps, Reading(reference.policy, sequences.token_lists(), states, list(plain))
