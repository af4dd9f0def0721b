"""The variants of the kernels that the public functions can reach, and how they are compiled.

Launches and ahead-of-time inspection use the same list. To keep it short, softcap and full KL exist only together with
the entropy's gradient, which runs with slope 0 if it is not asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import triton.language as tl

from ..codes import ENTROPY_GRADIENT, ENTROPY_NONE, ENTROPY_VALUE
from . import kernels, sequence_kernels
from .forms import KEPT, PERSISTENT, LaunchForm, Target, fused_form, single_sweep_form

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# The dtypes of logits and their gradient. The linear losses have fp32 logits and write the gradient for their GEMMs.
PAIRS = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp16"))
HOPPER = Target(32)
TILE = 1024  # rows in a tile of the kernels over sequences
SEQUENCES = (1, 8, 32, TILE)  # in a tile; as many as rows where each row is a sequence

_NUMBERS = {tl.float32: "fp32", tl.int32: "i32", tl.int64: "i64"}
_POINTERS = {"ids": "*i64", "index": "*i64", "mask": "*i1"} | dict.fromkeys(("flags", "bounds", "sequence_of"), "*i32")


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Args:
        name: unique.
        kind: fused, statistics, apply, scale, prepare or reduce.
        dtype: of the logits: fp32, bf16 or fp16.
        grad_dtype: of their gradient.
        kernel: the Triton function.
        signature: argument -> Triton type or "constexpr".
        constexprs: argument -> value.
        num_warps: of a program.
        max_registers: per thread, or None.
        elements_per_thread: logits per thread in one trip of the loop; 0 for kernels that read none.
        num_stages: of the loops that multiply matrices.
    """

    name: str
    kind: str
    dtype: str
    grad_dtype: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    max_registers: int | None
    elements_per_thread: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. Contraction is off, since fma is written where it is meant."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


def _signature(kernel: Any, constexprs: dict[str, Any], dtype: str, grad_dtype: str) -> dict[str, str]:
    """Return the Triton type of each argument of a kernel."""
    annotations, signature = kernel.fn.__annotations__, {}
    for name in kernel.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in ("logits", "ref_logits"):
            signature[name] = f"*{dtype}"
        elif name == "grad":
            signature[name] = f"*{grad_dtype}"
        elif name in annotations:
            signature[name] = _NUMBERS[annotations[name]]
        else:
            signature[name] = _POINTERS.get(name, "*fp32")
    return signature


def make_variant(
    kind: str,
    dtype: str,
    form: LaunchForm,
    target: Target,
    grad_dtype: str = "",
    **switches: Any,
) -> Variant:
    """Describe the variant of a kernel over rows. switches: ENTROPY, SOFTCAP and FULL_KL, as far as it has them."""
    kernel, grad_dtype = getattr(kernels, kind), grad_dtype or dtype
    elements = 16 // min(ELEMENT_BYTES[dtype], ELEMENT_BYTES[grad_dtype])
    constexprs = {"R": form.pieces, "E": elements, **switches}
    if kind == "fused":
        constexprs["FORM"] = form.rows
    entropy = ("", "entropy", "entropy-gradient")[switches.get("ENTROPY", ENTROPY_NONE)]
    parts = [
        kind,
        dtype,
        f"to-{grad_dtype}" * (grad_dtype != dtype),
        entropy,
        "softcap" * switches.get("SOFTCAP", False),
        "full-kl" * switches.get("FULL_KL", False),
        ("", "kept", "persistent")[form.rows],
        f"{form.warps}x{form.pieces}",
    ]
    return Variant(
        name="-".join(part for part in parts if part),
        kind=kind,
        dtype=dtype,
        grad_dtype=grad_dtype,
        kernel=kernel,
        signature=_signature(kernel, constexprs, dtype, grad_dtype),
        constexprs=constexprs,
        num_warps=form.warps,
        max_registers=form.max_registers,
        elements_per_thread=form.pieces * elements // (form.warps * target.warp_size),
    )


@functools.cache
def fused_variant(
    dtype: str, grad_dtype: str, columns: int, entropy: int, softcap: bool, full_kl: bool, target: Target
) -> Variant:
    """Return the variant that runs `fused` on rows of so many columns."""
    if softcap or full_kl:
        entropy = ENTROPY_GRADIENT
    size = ELEMENT_BYTES[dtype]
    form = fused_form(columns * size, size, grad_dtype != dtype, entropy, softcap, full_kl, target)
    return make_variant("fused", dtype, form, target, grad_dtype, ENTROPY=entropy, SOFTCAP=softcap, FULL_KL=full_kl)


@functools.cache
def statistics_variant(dtype: str, entropy: int, softcap: bool, target: Target) -> Variant:
    """Return the variant that runs `statistics`."""
    entropy = ENTROPY_VALUE if softcap or entropy else ENTROPY_NONE
    more = softcap or entropy != ENTROPY_NONE
    form = single_sweep_form(more, target)
    if dtype == "fp32" and not more and target.warp_size == 32 and not target.blackwell:
        form = replace(form, max_registers=40)  # without a limit the compiler of Triton 3.5 takes 32, two too few
    return make_variant("statistics", dtype, form, target, ENTROPY=entropy, SOFTCAP=softcap)


@functools.cache
def apply_variant(dtype: str, grad_dtype: str, softcap: bool, target: Target) -> Variant:
    """Return the variant that runs `apply`."""
    return make_variant("apply", dtype, single_sweep_form(softcap, target), target, grad_dtype, SOFTCAP=softcap)


@functools.cache
def scale_variant(dtype: str, target: Target) -> Variant:
    """Return the variant that runs `scale`."""
    return make_variant("scale", dtype, single_sweep_form(False, target), target)


@functools.cache
def sequence_variant(kind: str, count: int, sequences: int, target: Target) -> Variant:
    """Return the variant that runs `prepare` or `reduce` on so many rows in so many sequences.

    A tile takes as many sequences as there are, up to 32: what is done once for each then runs side by side.
    """
    tall = TILE if count <= sequences else max(size for size in SEQUENCES[:-1] if size <= max(sequences, 1))
    kernel, constexprs = getattr(sequence_kernels, kind), {"S": tall, "P": TILE // tall}
    signature, warps = _signature(kernel, constexprs, "fp32", "fp32"), 512 // target.warp_size
    # without a limit some compilers take fewer registers than they need for `prepare`; `reduce` needs more than 64
    limit = 64 if kind == "prepare" and target.warp_size == 32 else None
    name = f"{kind}-{tall}x{TILE // tall}"
    return Variant(name, kind, "fp32", "fp32", kernel, signature, constexprs, warps, limit, 0)


def candidates(target: Target = HOPPER) -> list[Variant]:
    """List variants of the plain loss that no public function reaches: forms to be measured beside the present ones."""
    pieces, limit = (
        512 if target.blackwell else 1024,
        80 if target.warp_size == 32 else None,
    )  # 64 registers are too few
    forms = [LaunchForm(256 // target.warp_size, pieces, limit, rows) for rows in (KEPT, PERSISTENT)]
    switches: dict[str, Any] = {"ENTROPY": ENTROPY_NONE, "SOFTCAP": False, "FULL_KL": False}
    return [make_variant("fused", "bf16", form, target, **switches) for form in forms]


def variants(target: Target = HOPPER) -> list[Variant]:
    """List all variants that public functions can reach on a target."""
    reachable: list[Variant] = []
    for dtype, grad_dtype in PAIRS:
        for columns in (1, 20_000, 100_000):
            for entropy in (ENTROPY_NONE, ENTROPY_VALUE, ENTROPY_GRADIENT):
                reachable.append(fused_variant(dtype, grad_dtype, columns, entropy, False, False, target))
            for softcap, full_kl in ((True, False), (False, True), (True, True)):
                reachable.append(fused_variant(dtype, grad_dtype, columns, ENTROPY_GRADIENT, softcap, full_kl, target))
        reachable += [apply_variant(dtype, grad_dtype, softcap, target) for softcap in (False, True)]
    for dtype in ELEMENT_BYTES:
        for entropy, softcap in ((ENTROPY_NONE, False), (ENTROPY_VALUE, False), (ENTROPY_VALUE, True)):
            reachable.append(statistics_variant(dtype, entropy, softcap, target))
        reachable.append(scale_variant(dtype, target))
    for kind in ("prepare", "reduce"):
        reachable += [sequence_variant(kind, 2 * size if size < TILE else size, size, target) for size in SEQUENCES]
    return list({variant.name: variant for variant in reachable}.values())
