"""Hidden states: the outputs of the layers of a causal LM or a trunk for packed prompts and responses."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repo_kernels import linear_selective_log_softmax

from ..attention.packed import using_packed
from ..attention.sdpa import Kernel
from ..data.packing import Packed
from ..data.segments import take_rows
from .lm_head import LmHead


@dataclass(frozen=True)
class States:
    """The hidden states of one forward pass over packed responses.

    packed: the inputs. hidden: (T, H) states after the embedding and each layer, or after the last layer alone.
    head: the LM head; None for a trunk.
    """

    packed: Packed
    hidden: tuple[Tensor, ...]
    head: LmHead | None

    def before(self, layer: int = -1) -> Tensor:
        """Select the states (N, H) that predict each response token."""
        return take_rows(self.hidden[layer], self.packed.rows)

    def of(self, layer: int = -1) -> Tensor:
        """Select the states (N, H) of each response token; the layout must hold the last ones (with_last)."""
        assert self.packed.inputs is not None
        return self.hidden[layer].index_select(0, self.packed.inputs)

    def head_arguments(self) -> dict[str, Any]:
        """Return the arguments hidden (N, H), weight and bias of a linear loss over the response tokens."""
        assert self.head is not None
        hidden, head = self.before().to(self.head.dtype), self.head
        hidden = hidden if head.scale == 1 else hidden * head.scale
        return {"hidden": hidden, "weight": head.weight, "bias": head.bias}

    def logps(self, temperature: float) -> Tensor:
        """Compute the log-probabilities (N,) of the response tokens, in nats, fp32."""
        assert self.head is not None
        logps = linear_selective_log_softmax(
            token_ids=self.packed.token_ids,
            temperature=temperature,
            softcap=self.head.softcap,
            **self.head_arguments(),
        )
        assert isinstance(logps, Tensor)
        return logps


def trunk_states(trunk: Any, packed: Packed, layers: bool = False, kernel: Kernel | None = None) -> tuple[Tensor, ...]:
    """Run a trunk on packed or padded rows and return its last states (T, H).

    layers: return the states of every layer instead, beginning with the embedding. kernel: of packed attention, one
    that can be part of a compiled layer; None: each layer chooses.
    """
    arguments: dict[str, Any] = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        del arguments["position_ids"]
    traced = packed.segments is not None and kernel is not None
    if traced:
        arguments["kernel"] = kernel
    with nullcontext() if packed.segments is None else using_packed(trunk, traced):
        reads = "attention_mask" if packed.segments is None else "segments"
        arguments[reads] = getattr(packed, reads)
        out = trunk(**arguments, use_cache=False, output_hidden_states=layers)
    states = out.hidden_states if layers else (out.last_hidden_state,)
    return tuple(x.reshape(-1, x.shape[-1]) for x in states)
