"""The variants of the kernels of a decode step, and how they are compiled. No form was measured on a device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..forms import Target
from ..variants import ELEMENT_BYTES, HOPPER, Variant
from . import attention, layer, sampling

LEAST_ROWS = 16  # of a matrix product on tensor cores; smaller groups of heads are padded
BLOCK = 2048  # logits of a block of the sampling
LANES = 1024  # elements of a block of the gate

_NUMBERS = {tl.float32: "fp32", tl.int32: "i32", tl.int64: "i64"}
_POINTERS = {
    **dict.fromkeys(("starts", "column", "tokens"), "*i64"),
    **dict.fromkeys(("parts", "maxima", "totals", "logps"), "*fp32"),
    **dict.fromkeys(("sums", "uniforms"), "*fp64"),
}


def _signature(kernel: Any, constexprs: dict[str, Any], dtype: str, other: dict[str, str]) -> dict[str, str]:
    """Return the Triton type of each argument. dtype: of pointers that are not named in `other` or _POINTERS."""
    types, signature = _POINTERS | {name: f"*{kind}" for name, kind in other.items()}, {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in kernel.fn.__annotations__:
            signature[name] = _NUMBERS[kernel.fn.__annotations__[name]]
        else:
            signature[name] = types.get(name, f"*{dtype}")
    return signature


def _variant(
    kernel: Any, parts: tuple[object, ...], dtype: str, constexprs: dict[str, Any], warps: int, stages: int = 1,
    elements: int = 0, **other: str,
) -> Variant:  # fmt: skip
    """Describe a variant. parts: of its name. elements: per thread in one trip of its loop. other: dtypes by name."""
    kind = kernel.fn.__name__
    name = "-".join(str(part) for part in (kind, *parts) if part != "")
    signature = _signature(kernel, constexprs, dtype, other)
    return Variant(name, kind, dtype, dtype, kernel, signature, constexprs, warps, None, elements, stages)


@functools.cache
def attend_variant(dtype: str, columns: int, group: int, softcap: bool, split: bool, target: Target) -> Variant:
    """Return the variant that attends with `group` heads of so many columns."""
    padded, width = max(LEAST_ROWS, triton.next_power_of_2(group)), triton.next_power_of_2(columns)
    keys = 8192 if dtype == "fp32" else 16384  # bytes at a time; with more in fp32 the compiler spills
    block = max(16, min(64, keys // (width * ELEMENT_BYTES[dtype])))
    constexprs = {"D": columns, "G": group, "P": padded, "B": width, "N": block, "SOFTCAP": softcap, "SPLIT": split}
    elements = block * width // (128 // target.warp_size * target.warp_size)
    parts = (dtype, f"{group}x{columns}", "softcap" * softcap, "split" * split)
    stages = 2 if target.warp_size == 32 and dtype != "fp32" else 1
    return _variant(attention.attend, parts, dtype, constexprs, 128 // target.warp_size, stages, elements)


@functools.cache
def join_variant(dtype: str, columns: int, group: int, target: Target) -> Variant:
    """Return the variant that joins the parts of `attend`."""
    padded, width = triton.next_power_of_2(group), triton.next_power_of_2(columns)
    constexprs = {"D": columns, "G": group, "P": padded, "B": width}
    return _variant(attention.join, (dtype, f"{group}x{columns}"), dtype, constexprs, 128 // target.warp_size)


@functools.cache
def sampling_variants(dtype: str, blocks: int, aligned: bool, target: Target) -> tuple[Variant, Variant]:
    """Return the variants of both levels of the sampling.

    blocks: of a row. aligned: rows begin at boundaries of 16 bytes and have a multiple of them.
    """
    width = triton.next_power_of_2(max(blocks, 2))
    forms = {"W": BLOCK, "E": 16 // ELEMENT_BYTES[dtype] if aligned else 1}
    parts = (dtype, "" if aligned else "unaligned")
    sums = _variant(sampling.block_sums, parts, dtype, forms, 128 // target.warp_size)
    choice = {**forms, "B": width}
    return sums, _variant(sampling.choose, (*parts, width), dtype, choice, 256 // target.warp_size)


@functools.cache
def norm_variant(dtype: str, out: str, width: int, add: bool, target: Target) -> Variant:
    """Return the variant of `add_norm`. dtype: of the hidden states and the weight; out: of its result and delta."""
    lanes = triton.next_power_of_2(width)
    warps = max(1, min(16, lanes // 512)) * 32 // target.warp_size or 1
    return _variant(
        layer.add_norm, (dtype, f"to-{out}" * (out != dtype), "add" * add, lanes), dtype, {"ADD": add, "W": lanes},
        warps, out=out, delta=out,
    )  # fmt: skip


@functools.cache
def place_variant(dtype: str, rotary: str, norms: str, columns: int, norm: bool, target: Target) -> Variant:
    """Return the variant of `place_heads`. dtype: of queries, keys and values; rotary: of cos and sin; norms: of the
    weights of its norms."""
    width = triton.next_power_of_2(columns)
    constexprs = {"D": columns, "B": width, "NORM": norm}
    return _variant(
        layer.place_heads, (dtype, f"by-{rotary}" * (rotary != dtype), "norm" * norm, columns), dtype, constexprs,
        1, cos=rotary, sin=rotary, q_norm=norms, k_norm=norms,
    )  # fmt: skip


@functools.cache
def gate_variant(dtype: str, target: Target) -> Variant:
    """Return the variant of `gate`."""
    return _variant(layer.gate, (dtype,), dtype, {"W": LANES}, 128 // target.warp_size)


def _each(dtype: str, target: Target) -> Iterator[Variant]:
    """Yield what a model of the shape of Qwen2.5-0.5B and one of Llama-3.1-8B decode with, and Qwen3's norms."""
    for group, columns in ((7, 64), (4, 128)):
        for softcap in (False, True):
            yield attend_variant(dtype, columns, group, softcap, False, target)
        yield attend_variant(dtype, columns, group, False, True, target)
        yield join_variant(dtype, columns, group, target)
        for norm in (False, True):
            yield place_variant(dtype, "fp32", "fp32", columns, norm, target)
    for aligned in (True, False):
        yield from sampling_variants(dtype, 75, aligned, target)
    for width in (896, 4096):
        for add in (False, True):
            yield norm_variant("fp32", dtype, width, add, target)
            yield norm_variant(dtype, dtype, width, add, target)
    yield gate_variant(dtype, target)


def variants(target: Target = HOPPER) -> list[Variant]:
    """List the variants of common models on a target; others are compiled when they are used."""
    found = [variant for dtype in ELEMENT_BYTES for variant in _each(dtype, target)]
    return list({variant.name: variant for variant in found}.values())
