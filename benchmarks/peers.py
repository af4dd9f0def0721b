"""The kernels that ours are put beside: Liger's GRPO loss and TRL's log-probability with entropy.

Each can be compiled ahead of time (static_variants) and run in Triton's interpreter (CALLS), where neither needs a
patch to take CPU tensors. What is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

NEEDS_GPU = "" if torch.cuda.is_available() else "its Triton kernels need a GPU; their traffic is in benchmarks.traffic"
VOCABULARY, LENGTH = 151936, 1024  # both packages make these compile-time constants


@dataclass(frozen=True)
class PeerVariant:
    """What gpu_static.inspect_variant needs to know of a kernel."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    elements_per_thread: int
    kind: str = "peer"
    dtype: str = "bf16"
    entropy: int = 0
    softcap: bool = False
    full_kl: bool = False


def missing(package: str) -> str | None:
    """Why a peer cannot be used, or None."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None


def _variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], per_thread: int, warps: int, stages: int
) -> PeerVariant:
    """A variant whose pointers are aligned to 16 bytes, as Triton finds them to be at a launch."""
    parameters = list(kernel.arg_names)
    signature = {p: "constexpr" if p in constants else types[p] for p in parameters}
    aligned = tuple(i for i, p in enumerate(parameters) if signature[p].startswith("*") or p.endswith("batch_stride"))
    return PeerVariant(name, kernel, signature, constants, aligned, warps, stages, per_thread)


def _liger(warp_size: int) -> list[PeerVariant]:
    """Forward and backward of the token-level loss, with the launch options of its autograd function."""
    from liger_kernel.ops import grpo_loss

    floats = "OLD_LOGP REF_LOGP ADVANTAGES LOSS LSE KL IS_CLIPPED DLOSS".split()
    types = dict.fromkeys(floats, "*fp32") | {"LOGITS": "*bf16", "DLOGITS": "*bf16", "INPUT_IDS": "*i64"}
    types |= dict.fromkeys(("VLLM_IS_RATIO_STRIDE", "loss_stride0", "loss_stride1"), "i32")
    constants: dict[str, Any] = dict.fromkeys(("COMPLETION_MASK", "VLLM_IS_RATIO", "PHI_SEQ"))
    constants |= {"TEMPERATURE": 0.9, "BETA": 0.04, "EPS_LOW": 0.2, "EPS_HIGH": 0.4, "LOSS_TYPE": 0}
    constants |= {"SAPO_TEMP_POS": 1.0, "SAPO_TEMP_NEG": 1.05, "DELTA": 0.0, "USE_BIAS_CORRECTION_KL": False}
    constants |= {"L": LENGTH, "N": VOCABULARY}
    found = []
    for name, kernel, block, warps, stages in (
        ("liger-forward", grpo_loss._grpo_loss_fwd_kernel, 2048, 1, 2),
        ("liger-backward", grpo_loss._grpo_loss_bwd_kernel, 4096, 16, 1),
    ):
        own = {k: v for k, v in constants.items() if k in kernel.arg_names} | {"BLOCK_N": block}
        found.append(_variant(name, kernel, types, own, max(block // (warps * warp_size), 1), warps, stages))
    return found


def _trl(warp_size: int) -> list[PeerVariant]:
    """Forward and backward without a mask and without the gradient of the entropy, at Triton's default options."""
    from trl.kernels import logprob_entropy

    block, warps = logprob_entropy._BLOCK_SIZE, 4
    found = []
    for name, kernel in (
        ("trl-forward", logprob_entropy._forward_kernel),
        ("trl-backward", logprob_entropy._backward_kernel),
    ):
        types = {p: "*fp32" if p.endswith("_ptr") else "i32" for p in kernel.arg_names}
        types |= {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "index_ptr": "*i64", "row_mask_ptr": "*i64"}
        constants = {"n_cols": VOCABULARY, "TEMPERATURE": 1.0, "HAS_MASK": False, "BLOCK_SIZE": block}
        constants |= {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": False} if "backward" in name else {}
        # Strides are multiples of 16, but for those of size 1, which Triton folds into the code.
        constants |= {p: 1 for p in kernel.arg_names if p in ("index_row_stride",)}
        constants |= {p: 0 for p in kernel.arg_names if p.startswith("mask_")}
        variant = _variant(name, kernel, types, constants, max(block // (warps * warp_size), 1), warps, 3)
        strides = tuple(i for i, p in enumerate(kernel.arg_names) if p.endswith("logits_row_stride"))
        found.append(PeerVariant(**{**vars(variant), "divisible": (*variant.divisible, *strides)}))
    return found


def static_variants(target: str) -> list[PeerVariant]:
    """Kernels of the installed peers for a target of gpu_static."""
    warp_size = 64 if target.startswith("gfx") else 32
    found = []
    if not missing("liger-kernel"):
        found += _liger(warp_size)
    if not missing("trl"):
        found += _trl(warp_size)
    return found


def liger_call(logits: Tensor) -> None:
    """Loss and gradient of (N, V) logits with KL, the gradient written over the logits (its default).

    Liger takes (B, L + 1, V) and leaves the last position out; here it is one more row, which no kernel touches.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    padded = torch.cat((logits.detach(), logits.detach()[:1]))[None].requires_grad_()
    rows = logits.shape[0]
    ids, zeros = torch.ones(1, rows, dtype=torch.int64), torch.zeros(1, rows)
    loss, _, _ = triton_grpo_loss(padded, zeros, zeros, ids, torch.ones(1))
    loss.sum().backward()


def trl_call(logits: Tensor) -> None:
    """Log-probability and entropy of (N, V) logits, and the gradient of the log-probability."""
    from trl.kernels import selective_log_softmax_and_entropy

    leaf = logits.detach().requires_grad_()
    logps, _ = selective_log_softmax_and_entropy(leaf, torch.ones(logits.shape[0], dtype=torch.int64))
    logps.sum().backward()


# Package, title, call.
CALLS: tuple[tuple[str, str, Callable[[Tensor], None]], ...] = (
    ("liger-kernel", "Liger `triton_grpo_loss`", liger_call),
    ("trl", "TRL `selective_log_softmax_and_entropy`", trl_call),
)
