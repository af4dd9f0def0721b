"""Sharding: trained weights, gradients and optimiser states split over processes by FSDP2, and whole copies of them."""

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
    """Whether this process holds a part of it."""
    return isinstance(tensor, DTensor)


def shard(
    actor: nn.Module, critics: Iterable[nn.Module], count: int, device: torch.device, compute: torch.dtype | None
) -> None:
    """Split every decoder layer, every critic and what is left of the actor over `count` processes; in place.

    With more processes than `count` there are several such copies, whose gradients are added too (HSDP). compute: dtype
    of the policy's forward pass, in which its weights are gathered; None: as they are, like those of its critics.
    Gradients are summed in fp32, not averaged: losses are divided by counts over all processes.
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
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter by name, gathered one after another; every process takes part to the end."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Bring a model that is whole up to date with one that is sharded."""
    if source is target:
        return
    into = dict(target.named_parameters())
    for name, value in whole_weights(source):
        into[name].copy_(value)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def require_finite_weights(model: nn.Module, world: World, when: str) -> None:
    """Raise UserError that names the first trained weight with a NaN or an infinity. Every process calls it."""
    trained = [(name, local(p)) for name, p in model.named_parameters() if p.requires_grad]
    # the sum is finite unless a term is not or it overflows; only then is every element looked at
    bad = next((n for n, p in trained if not bool(p.sum().isfinite()) and not bool(p.isfinite().all())), None)
    if bad := next((name for name in world.gather(bad) if name is not None), None):
        raise UserError(f"weight {bad} is not finite {when}; lower optimizer.lr, or look at the scores")
