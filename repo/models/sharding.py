"""Sharding: split trained weights, gradients and optimiser states over processes by FSDP2, and gather whole weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..common.distributed import World
from ..common.errors import UserError
from .layers import decoder_layers


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is split over processes, so that this one holds a part of it."""
    return isinstance(tensor, DTensor)


def shard(
    actor: nn.Module, critics: Iterable[nn.Module], count: int, device: torch.device, compute: torch.dtype | None
) -> None:
    """Split every decoder layer, every critic and the rest of the actor over `count` processes, in place.

    With more processes than `count` there are several copies, whose gradients are added too (HSDP). Gradients are
    summed in fp32 and not averaged, because losses are already divided by counts over all processes.

    compute: dtype of the policy's forward pass, in which its weights are gathered; None: the dtype of the weights,
    which critics always use.
    """
    copies = dist.get_world_size() // count
    names = ("copy", "shard")
    mesh = init_device_mesh(device.type, (copies, count), mesh_dim_names=names)
    mesh = mesh if copies > 1 else mesh["shard"]
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for critic in critics:
        for module in (*decoder_layers(critic), critic):
            fully_shard(module, mesh=mesh, mp_policy=exact)
    for layer in decoder_layers(actor):
        if not isinstance(layer, FSDPModule):
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    # the inputs of the root are token ids and what its losses compare with, which stays fp32
    fully_shard(actor, mesh=mesh, mp_policy=replace(precision, cast_forward_inputs=False))
    for module in actor.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of each parameter, gathered one after another. Every process iterates to the end."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of a model, sharded or not, into an unsharded one. Does nothing if both are the same object."""
    if source is target:
        return
    into = dict(target.named_parameters())
    for name, value in whole_weights(source):
        into[name].copy_(value)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory; an unsharded tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def require_finite_weights(model: nn.Module, world: World, when: str) -> None:
    """Raise UserError that names the first trained weight with a NaN or an infinity. Every process calls it.

    when: words for the message, e.g. "after step 3".
    """
    trained = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    # a finite sum means finite terms; only if it is not (also by overflow) is every element checked
    bad = next((n for n, p in trained if not bool(p.sum().isfinite()) and not bool(p.isfinite().all())), None)
    if bad := next((name for name in world.gather(bad) if name is not None), None):
        raise UserError(f"weight {bad} is not finite {when}; lower optimizer.lr, or look at the scores")
