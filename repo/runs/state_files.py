"""State files: write the tensors of policy, critics and optimiser to safetensors files, and load them again.

A run of whole weights writes one file. If weights are sharded, each process writes a file of its shards, and torch's
distributed checkpoint puts them together again for any number of processes. Nothing is pickled.
"""

from __future__ import annotations

import itertools
import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from ..common.errors import UserError, first_line
from ..common.files import write_past_cache
from ..models.credit import Credit
from ..models.sharding import is_sharded

Numbers = dict[str, float | int]
MODEL, OPTIMIZER, CREDIT, FILE = "model.", "optimizer.", "credit.", "state.safetensors"
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float64: "F64",
}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name; tied parameters occur once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer, credit: Credit | None = None
) -> tuple[dict[str, Tensor], Numbers]:
    """Collect the trained weights and the states of optimiser and credit: (tensors, not copied, and plain numbers).

    Names are `model.<parameter>`, `optimizer.<state>.<parameter>` and `credit.<state>`.
    """
    parameters, numbers = trained_parameters(model), Numbers()
    tensors = {MODEL + name: p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{key}.{name}"] = value.detach()
            else:
                numbers[f"{OPTIMIZER}{key}.{name}"] = value
    return tensors | _of_credit(credit), numbers


def _of_credit(credit: Credit | None) -> dict[str, Tensor]:
    return {} if credit is None else {CREDIT + name: tensor for name, tensor in credit.tensors().items()}


def write(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write whole tensors to one safetensors file; return its CRC-32 by its name.

    The library's save_file would fill the page cache; `write_past_cache` says why that matters.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = itertools.chain([memoryview(struct.pack("<Q", len(text)) + text)], map(_bytes_of, tensors.values()))
    return {FILE: write_past_cache(folder / FILE, parts)}


def _bytes_of(tensor: Tensor) -> memoryview:
    data: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's shards to a file of its own; all processes must call it together."""
    try:
        dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # a BaseException
        raise UserError(f"cannot write {folder}: {_cause(error)}; the checkpoint before is intact") from error


def restore(
    folder: Path,
    numbers: Numbers,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    credit: Credit | None = None,
) -> None:
    """Load the tensors of a checkpoint, written by any number of processes, into model, optimiser and credit.

    numbers: the optimiser's plain numbers, as `collect` returned them. Raises UserError if the checkpoint belongs to
    other parameters or cannot be read.
    """
    parameters, saved = trained_parameters(model), _shapes(folder)
    if {name.removeprefix(MODEL) for name in saved if name.startswith(MODEL)} != parameters.keys():
        raise UserError(f"{folder} belongs to another model: its parameters have other names")
    begun = any(name.startswith(CREDIT) for name in saved)  # else algorithm.credit was changed: nothing is learned yet
    learned = _of_credit(credit) if begun else {}
    if wrong := [name for name, t in learned.items() if saved.get(name, (None,))[0] != tuple(t.shape)]:
        raise UserError(f"{folder} belongs to another model: its {wrong[0]} has another shape")
    targets = {MODEL + name: p.detach() for name, p in parameters.items()} | learned
    state: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for name, (shape, dtype) in saved.items():
        if name.startswith(OPTIMIZER):
            key, parameter = _split(name)
            like = parameters[parameter]
            same = tuple(like.shape) == shape
            target = torch.zeros_like(like, dtype=dtype) if same else torch.zeros(shape, dtype=dtype)
            targets[name] = state[parameter][key] = target.detach()
        elif name.startswith(MODEL) and targets[name].shape != shape:
            raise UserError(f"{folder} belongs to another model: {name} has shape {shape}")
    for name, number in numbers.items():
        key, parameter = _split(name)
        state[parameter][key] = number
    _load(folder, targets)
    _load_optimizer(optimizer, {id(p): state[name] for name, p in parameters.items()})


def restore_weights(folder: Path, model: nn.Module) -> None:
    """Load only the trained weights of a checkpoint into a model. Raises UserError if it lacks one of that shape."""
    targets = {MODEL + name: p.detach() for name, p in trained_parameters(model).items()}
    saved = _shapes(folder)
    if wrong := [name for name, t in targets.items() if saved.get(name, (None,))[0] != tuple(t.shape)]:
        raise UserError(f"{folder} belongs to another model: it has no {wrong[0]} of that shape")
    _load(folder, targets)


def _load(folder: Path, targets: dict[str, Tensor]) -> None:
    """Fill tensors, whole or sharded, with the saved ones of the same names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist asks for that
        alone = not any(is_sharded(t) for t in targets.values())
        try:
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        except CheckpointException as error:
            raise UserError(f"cannot read {folder}: {_cause(error)}") from error


def _cause(error: CheckpointException) -> str:
    """Describe the error of the lowest-ranked process that failed."""
    rank, (cause, _) = min(error.failures.items())
    return f"process {rank}: {first_line(cause)}"


def _split(name: str) -> tuple[str, str]:
    """Split optimizer.<state>.<parameter> into (state, parameter)."""
    key, _, parameter = name.removeprefix(OPTIMIZER).partition(".")
    return key, parameter


def _shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Read the whole shape and the dtype of every tensor in the folder's files, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tuple(m.size), m.properties.dtype) for name, m in metadata.items()}  # type: ignore[union-attr]


def _load_optimizer(optimizer: torch.optim.Optimizer, state_of: Mapping[int, dict[str, Any]]) -> None:
    """Load each parameter's state into the optimiser, by way of its state_dict. state_of: by id of the parameter."""
    saved = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved["state"] = {i: state_of[id(p)] for i, p in enumerate(parameters) if state_of[id(p)]}
    optimizer.load_state_dict(saved)
