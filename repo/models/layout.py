"""Layout: the way in which a model reads prompts and responses, found by a trial against sequences read alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.candidates import choose_kernel, sdpa_name
from ..attention.packed import using_packed
from ..attention.sdpa import Kernel
from ..common.config_fields import config_field, equal_head_sizes, head_size
from ..common.errors import UserError, first_line
from ..data.packing import Packed, pack, pad
from ..data.sequences import Sequences, make_sequences
from ..data.token_ids import plain_ids
from .hidden_states import trunk_states
from .lm_head import trunk_of


@dataclass(frozen=True)
class Attention:
    """The way a model reads prompts and responses.

    packs: True for end to end in one row (packing.pack), False for padded (packing.pad). name: of the kernel or the
    function that computes attention. why: the reasons why no faster one is used, "" if there is none faster.
    pads: several sequences are padded to one batch; False reads them one at a time where they are not packed.
    kernel: the function of a packing model if it can be part of a compiled layer; None: it is chosen in each layer.
    """

    packs: bool
    name: str
    why: str
    pads: bool = True
    kernel: Kernel | None = field(default=None, repr=False, compare=False)

    def describe(self) -> str:
        """Describe it in one line."""
        return f"attention: {self.name}" + ", packed" * self.packs + f" ({self.why})" * bool(self.why)


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> Attention:
    """Decide how a model reads its input: by its config, then by a trial in which packed sequences, or else
    padded ones, must give the same states as separate ones. model: a causal LM or a trunk.

    dtype: of the forward pass; autocast is used if the weights have another one. Raises UserError if a sequence alone
    is not read the same by positions and mask as without them.
    """
    trunk, text = trunk_of(model), model.config.get_text_config()
    probe = _probe_sequences(trunk)
    with torch.autocast(device.type, dtype, enabled=dtype != model.dtype):
        alone = _read_alone(trunk, probe, device)
        obstacle = _obstacle(trunk, probe, alone, dtype)
        if obstacle:
            why_alone = _padding_obstacle(trunk, probe, alone, dtype)
    if obstacle:
        own = f"the model's own {config_field(text, '_attn_implementation', 'layers')}"
        if why_alone:
            return Attention(False, f"one sequence at a time, {own}", f"{obstacle}; {why_alone}", pads=False)
        return Attention(False, f"padded batches, {own}", obstacle)
    softcap = config_field(text, "attn_logit_softcapping") is not None
    if not equal_head_sizes(text):
        return Attention(True, sdpa_name(softcap), "queries and values have heads of different sizes")
    window = config_field(text, "sliding_window") is not None
    choice = choose_kernel(device, dtype, head_size(text), softcap, window)
    return Attention(True, choice.name, choice.why, kernel=choice.kernel if choice.traceable else None)


def probe_rows(model: Any, attention: Attention) -> Packed:
    """Lay a few short sequences out for a trial as `attention` says. model: a causal LM or a trunk."""
    probe, rows = _probe_sequences(trunk_of(model)), torch.arange(4 if attention.packs or attention.pads else 1)
    return pack(probe, rows, share_prefix=True) if attention.packs else pad(probe, rows)


def _probe_sequences(trunk: Any) -> Sequences:
    """Make four short responses to two prompts, three of them to the same one."""
    ids = plain_ids(trunk, 4, 9, "packing probe").tolist()
    prompts, responses = [ids[0][:5]] * 3 + [ids[1][:3]], [ids[1][:5], ids[2][:5], ids[3][:3], ids[2][5:]]
    return make_sequences(prompts, responses, 0, torch.tensor([0, 0, 0, 1]))


@torch.no_grad()
def _read_alone(trunk: Any, probe: Sequences, device: torch.device) -> list[Tensor]:
    """Compute the states (response tokens, H) that predict the tokens of each response, each from a pass of its own.

    Raises UserError if the trunk cannot read plain token ids.
    """
    states = []
    for prompt, response in probe.token_lists():
        ids = torch.tensor([prompt + response[:-1]], device=device)
        try:
            states.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
        except Exception as error:  # models raise errors of many types
            raise UserError(
                f"model.path: {type(trunk).__name__} cannot read a sequence of token ids: {first_line(error)}"
            ) from error
    return states


def _obstacle(trunk: Any, probe: Sequences, alone: list[Tensor], dtype: torch.dtype) -> str | None:
    """Return the reason why a model cannot read packed rows, None if it can. alone: the states of each row alone."""
    name, text = type(trunk).__name__, trunk.config.get_text_config()
    kinds = config_field(text, "layer_types")
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return f"{name} has layers of {', '.join(sorted(other))}"
    if not getattr(trunk, "_supports_attention_backend", False):
        return f"{name} does not accept a custom attention function"
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return f"{name} takes no position_ids"
    packed = pack(probe, torch.arange(4), share_prefix=True).to(alone[0].device)
    windows: dict[int, int | None] = {}
    try:
        difference = _packed_difference(trunk, packed, alone, windows)
    except Exception as error:  # models raise errors of many types
        return f"{name} failed on packed rows: {first_line(error)}"
    window = config_field(text, "sliding_window")
    kinds = kinds or ["sliding_attention"] * len(windows)  # without layer_types the window holds for every layer
    expected = {layer: window if kinds[layer] == "sliding_attention" else None for layer in windows}
    if windows != expected:
        return f"{name} does not pass the windows of its layers to its attention function"
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    return None if difference < tolerance else f"packed rows change the states of {name} by {difference:.1e}"


@torch.no_grad()
def _packed_difference(trunk: Any, packed: Packed, alone: list[Tensor], windows: dict[int, int | None]) -> float:
    """Compare packed states with those of each row alone; returns the largest difference relative to the largest state.

    windows: filled with each layer's sliding window, which has no effect on rows as short as these.
    """
    arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments}
    with using_packed(trunk):
        packed_states = trunk(**arguments, windows=windows, use_cache=False).last_hidden_state[0, packed.rows]
    states = torch.cat([alone[row] for row in packed.order.tolist()])
    return float((packed_states - states).abs().max() / states.abs().max())


@torch.no_grad()
def _padding_obstacle(trunk: Any, probe: Sequences, alone: list[Tensor], dtype: torch.dtype) -> str | None:
    """Return the reason why a model cannot read padded batches, None if it can.

    Raises UserError if a batch of one row, which has no padding, is read otherwise than a sequence without a mask.
    """
    name, reasons = type(trunk).__name__, []
    for rows in (torch.arange(4), torch.tensor([0])):
        padded = pad(probe, rows).to(alone[0].device)
        expected = torch.cat([alone[row] for row in padded.order.tolist()])
        try:
            got = trunk_states(trunk, padded)[0][padded.rows]
            difference = relative_difference(got, expected)
        except Exception as error:  # models raise errors of many types
            reasons.append(f"fails: {first_line(error)}")
            continue
        if difference >= (1e-4 if dtype == torch.float32 else 0.1):
            reasons.append(f"changes the states of {name} by {difference:.1e}")
            continue
        try:
            difference = _gradient_difference(trunk, padded, probe)
        except Exception as error:  # models raise errors of many types
            reasons.append(f"fails in the backward pass: {first_line(error)}")
            continue
        if difference < (1e-3 if dtype == torch.float32 else 0.2):
            return f"padding {reasons[0]}" if reasons else None
        reasons.append(f"changes the gradients of {name} by {difference:.1e}")
    raise UserError(
        f"model.path: {name} cannot be trained here: padding {reasons[0]}, and reading one sequence with its positions "
        f"and mask {reasons[1]}"
    )


@torch.enable_grad()
def _gradient_difference(trunk: Any, padded: Packed, probe: Sequences) -> float:
    """Compare the gradients of trained weights through padded rows and through each row alone, by their norms.

    Where nothing is trained, the gradient of the first matrix, mostly the embedding, stands for all.
    """
    rows, floating = probe.token_lists(), [p for p in trunk.parameters() if p.is_floating_point()]
    weights = [p for p in floating if p.requires_grad]
    frozen = [] if weights else [p for p in floating if p.ndim == 2][:1]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        got = trunk_states(trunk, padded)[0][padded.rows]
        alone = []
        for prompt, response in (rows[row] for row in padded.order.tolist()):
            ids = torch.tensor([prompt + response[:-1]], device=padded.device)
            alone.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
        direction = torch.arange(got.numel(), device=padded.device).view_as(got).sin().to(got.dtype)
        pairs = [
            torch.autograd.grad((states * direction).sum(), weights + frozen, materialize_grads=True)
            for states in (got, torch.cat(alone))
        ]
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    squares = [
        (float((a - b).float().square().sum()), float(b.float().square().sum())) for a, b in zip(*pairs, strict=True)
    ]
    return (sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Compare two tensors: in fp32 by the largest difference relative to the largest value, else by their norms.

    In half precision the norms, because one expert that is chosen differently moves a few rows far.
    """
    if not bool(got.isfinite().all()):
        return float("inf")
    difference, scale = (got - expected).float(), expected.float()
    if expected.dtype == torch.float32:
        return float(difference.abs().max() / scale.abs().max())
    return float(difference.norm() / scale.norm())
