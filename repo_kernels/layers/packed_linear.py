"""Linear layers whose weights are prepared once for the many small products of decoding.

In fp32 on a CPU they are packed for oneDNN: with 16 rows, `F.linear` spends most of its time repacking the weight.
Under autocast they are cast once: autocast keeps its copies in a cache that a CUDA graph cannot use. The prepared
weight is a copy, so the layers must not be trained inside the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .forwards import replaced_forwards

Forward = Callable[[Tensor], Tensor]


def available(module: nn.Module) -> bool:
    """Return whether this PyTorch has oneDNN's packed linear and the module computes in fp32 on the CPU."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@contextmanager
def packed_linears(module: nn.Module, batch_size: int) -> Iterator[None]:
    """Context in which every nn.Linear of the module multiplies by a packed or cast copy of its present weight.

    Args:
        module: on one device.
        batch_size: rows per product, for which oneDNN packs.
    """
    prepare = _prepare(module, batch_size)
    layers = [m for m in module.modules() if type(m) is nn.Linear]
    with replaced_forwards({} if prepare is None else {layer: prepare(layer) for layer in layers}):
        yield


def _prepare(module: nn.Module, batch_size: int) -> Callable[[nn.Linear], Forward] | None:
    """Return what makes the forward of a layer from its weight, or None if nothing would be gained."""
    if available(module):
        return lambda layer: _packed(layer, batch_size)
    device = next((p.device.type for p in module.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        return lambda layer: _cast(layer, torch.get_autocast_dtype(device))
    return None


def _packed(layer: nn.Linear, batch_size: int) -> Forward:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), batch_size)
    bias = layer.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _cast(layer: nn.Linear, dtype: torch.dtype) -> Forward:
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return lambda x: linear(x, weight, bias)  # autocast casts x
