"""The Triton kernels that ours are put beside, as their packages launch them for bf16 logits: what to compile.

Every kernel that does the work of one of ours: Liger's GRPO loss (by token and by sequence), its log-probabilities,
cross-entropy and scaling; TRL's log-probabilities with entropy, and the folds of its chunked log-probabilities and
divergences; cut-cross-entropy's matrix products with a loss in them. Block sizes and warps are the packages' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.workloads.peers import missing

VOCABULARY, LENGTH = 151936, 1024  # compile-time constants of Liger and TRL
HIDDEN = 4096  # of cut-cross-entropy's matrices


@dataclass(frozen=True)
class PeerVariant:
    """What gpu_static.inspect_variant needs to know of a kernel; its last numbers as in StaticReport."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    elements_per_thread: float
    passes: int = 0
    hidden: int = 0
    bytes_per_logit: float = 0.0
    kind: str = "peer"
    dtype: str = "bf16"
    entropy: int = 0
    softcap: bool = False
    full_kl: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is given: Triton's defaults but for warps and stages, as at a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _variant(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    elements: float,
    warps: int,
    stages: int = 3,
    aligned: Iterable[str] = (),
    **more: Any,
) -> PeerVariant:
    """A variant whose pointers, and the arguments named in `aligned`, are multiples of 16, as Triton finds them to be
    at a launch. elements: logits of a thread. Constants that the kernel does not take are left out."""
    parameters = list(kernel.arg_names)
    constants = {p: constants[p] for p in parameters if p in constants}
    signature = {p: "constexpr" if p in constants else types[p] for p in parameters}
    divisible = tuple(i for i, p in enumerate(parameters) if signature[p].startswith("*") or p in aligned)
    return PeerVariant(name, kernel, signature, constants, divisible, warps, stages, elements, **more)


def _liger_grpo(warp_size: int) -> list[PeerVariant]:
    """With the options of the launches in liger_kernel.ops.grpo_loss: a KL, no mask, no importance weights."""
    from liger_kernel.ops import grpo_loss

    floats = "OLD_LOGP REF_LOGP ADVANTAGES LOSS LSE KL IS_CLIPPED DLOSS LOG_P COEF_1 COEF_1_RAW COEF_2 IS_CLIPPED_SEQ"
    types = dict.fromkeys((*floats.split(), "DLOSS_SUM", "SEQ_LEN"), "*fp32")
    types |= {"LOGITS": "*bf16", "DLOGITS": "*bf16", "INPUT_IDS": "*i64"}
    strides = "VLLM_IS_RATIO_STRIDE loss_stride0 stride_input_ids_b stride_mask_b stride_mask_l"
    types |= dict.fromkeys(strides.split(), "i32")
    constants: dict[str, Any] = dict.fromkeys(("COMPLETION_MASK", "VLLM_IS_RATIO", "PHI_SEQ", "MASK", "DKL_SUM"))
    constants |= {"TEMPERATURE": 0.9, "BETA": 0.04, "EPS_LOW": 0.2, "EPS_HIGH": 0.4, "LOSS_TYPE": 0}
    constants |= {"SAPO_TEMP_POS": 1.0, "SAPO_TEMP_NEG": 1.05, "DELTA": 0.0, "USE_BIAS_CORRECTION_KL": False}
    constants |= {"L": LENGTH, "N": VOCABULARY, "loss_stride1": 1, "stride_input_ids_l": 1}
    aligned = ("VLLM_IS_RATIO_STRIDE", "loss_stride0", "stride_input_ids_b", "stride_mask_b", "stride_mask_l")
    return [
        _variant(
            name,
            kernel,
            types,
            constants | {"BLOCK_N": block},
            max(block // (warps * warp_size), 1),
            warps,
            stages,
            aligned,
            passes=passes,
        )
        for name, kernel, block, warps, stages, passes in (
            ("liger-forward", grpo_loss._grpo_loss_fwd_kernel, 2048, 1, 2, 1),
            ("liger-backward", grpo_loss._grpo_loss_bwd_kernel, 4096, 16, 1, 2),
            ("liger-sequence-forward", grpo_loss._grpo_loss_fwd_kernel_seq, 2048, 1, 2, 1),
            ("liger-sequence-backward", grpo_loss._grpo_loss_bwd_kernel_seq, 4096, 16, 1, 2),
            ("liger-log-softmax", grpo_loss._selective_log_softmax_kernel, 2048, 1, 4, 1),
        )
    ]


def _liger_cross_entropy(warp_size: int) -> list[PeerVariant]:
    """As fused_linear_cross_entropy launches it on a chunk of logits, and what multiplies a gradient by a scalar."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.utils import element_mul_kernel

    block, warps = 65536 // 2, 32 if warp_size == 32 else 16
    types = {"X_ptr": "*bf16", "Y_ptr": "*i64", "loss_ptr": "*fp32", "grad_output_ptr": "*bf16", "X_stride": "i32"}
    types |= dict.fromkeys(("n_cols", "n_non_ignore", "sum_non_ignore_weight", "ignore_index"), "i32")
    types |= {"weight_sum": "fp32", "token_accuracy_stride": "i32", "predicted_tokens_stride": "i32"}
    constants: dict[str, Any] = dict.fromkeys(
        ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    )
    constants |= {"Y_stride": 1, "loss_stride": 1, "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean"}
    flags = "RETURN_Z_LOSS RETURN_TOKEN_ACCURACY RETURN_PREDICTED_TOKENS HAS_WEIGHT HAS_SOFTCAPPING"
    constants |= dict.fromkeys(flags.split(), False)
    constants |= {"HAS_GRADIENTS": True, "BLOCK_SIZE": block, "X_col_stride": 1}
    strides = ("X_stride", "n_cols", "token_accuracy_stride", "predicted_tokens_stride")
    elements = block // (warps * warp_size)
    return [
        _variant(name, kernel, types, constants, elements, warps, aligned=strides, passes=2)
        for name, kernel in (("liger-cross-entropy", liger_cross_entropy_kernel), ("liger-scale", element_mul_kernel))
    ]


def _trl(warp_size: int) -> list[PeerVariant]:
    """Without and with a row mask, and with the gradient of the entropy; at Triton's default options."""
    from trl.kernels import logprob_entropy

    forward, backward = logprob_entropy._forward_kernel, logprob_entropy._backward_kernel
    block, warps = logprob_entropy._BLOCK_SIZE, 4
    types = {p: "*fp32" if p.endswith("_ptr") else "i32" for kernel in (forward, backward) for p in kernel.arg_names}
    types |= {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "index_ptr": "*i64"}
    # Strides are multiples of 16, but for those of size 1, which Triton folds into the code.
    constants = {"n_cols": VOCABULARY, "TEMPERATURE": 1.0, "BLOCK_SIZE": block, "index_row_stride": 1}
    constants |= {"HAS_LOGPROB_GRAD": True}
    strides = [p for p in types if p.endswith(("batch_stride", "logits_row_stride"))]
    found = []
    for mask in (False, True):
        types["row_mask_ptr"] = "*i1" if mask else "*i64"
        own = constants | {"HAS_MASK": mask, "mask_row_stride": int(mask)} | ({} if mask else {"mask_batch_stride": 0})
        for name, kernel, entropy, passes in (
            ("trl-forward", forward, False, 1),
            ("trl-backward", backward, False, 2),
            ("trl-backward-entropy", backward, True, 2),
        ):
            found.append(
                _variant(
                    name + "-mask" * mask,
                    kernel,
                    types,
                    own | {"HAS_ENTROPY_GRAD": entropy},
                    block // (warps * warp_size),
                    warps,
                    aligned=strides,
                    passes=passes,
                    entropy=2 * entropy,
                )
            )
    return found


def _trl_chunked(warp_size: int) -> list[PeerVariant]:
    """The folds of one tile of logits that cuBLAS has written: log-probabilities with entropy; KL and JSD of two
    models, whose tiles are fp32."""
    from trl.kernels import chunked_divergence, chunked_logprob

    block, warps = chunked_logprob._BLOCK_SIZE, 4
    scalars = ("logit_scale", "softcap", "inv_t", "beta", "s_scale", "s_softcap", "t_scale", "t_softcap")
    constants: dict[str, Any] = dict.fromkeys(("HAS_SOFTCAP", "S_HAS_SOFTCAP", "T_HAS_SOFTCAP"), False)
    constants |= {"HAS_ENTROPY": True, "HAS_LOG_SUM_SQ_PROBS": False, "HAS_MEAN_LOGITS": False, "HAS_IS_TOP1": False}
    constants |= {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True, "BLOCK_SIZE": block, "MODE": 1}
    strides = ("mm_stride", "s_stride", "t_stride", "n_cols", "vocab_start")
    found = []
    for name, kernel, dtype, passes in (
        ("trl-chunked-forward", chunked_logprob._forward_kernel, "bf16", 1),
        ("trl-chunked-backward", chunked_logprob._backward_kernel, "bf16", 2),
        ("trl-divergence-statistics", chunked_divergence._stats_kernel, "fp32", 2),
        ("trl-divergence-jsd", chunked_divergence._jsd_kernel, "fp32", 2),
        ("trl-divergence-backward", chunked_divergence._backward_kernel, "fp32", 3),
    ):
        types = {p: "*fp32" if p.endswith("_ptr") else "i32" for p in kernel.arg_names}
        types |= dict.fromkeys(scalars, "fp32") | {"mm_ptr": f"*{dtype}", "targets_ptr": "*i64"}
        found.append(
            _variant(
                name,
                kernel,
                types,
                constants,
                block // (warps * warp_size),
                warps,
                aligned=strides,
                passes=passes,
                dtype=dtype,
                full_kl="divergence" in name,
            )
        )
    return found


def _cut_cross_entropy(warp_size: int) -> list[PeerVariant]:
    """Its matrix products, in the blocks that it takes without autotuning (tl_autotune.*_best_config). Each loop of
    the first and the last loads (BLOCK_B + BLOCK_V) x HIDDEN elements for a tile of BLOCK_B x BLOCK_V logits; the
    indexed dot computes the logits of the targets alone, BLOCK_B of them, HIDDEN / BLOCK_D programs for each."""
    from cut_cross_entropy import cce_backward, cce_lse_forward, indexed_dot, tl_autotune

    matrices = ("E", "C", "dE", "dC")
    types = dict.fromkeys(matrices, "*bf16") | dict.fromkeys(("LSE", "dOut", "Out"), "*fp32")
    types |= {"Locks": "*u32", "dELocks": "*i32", "dCLocks": "*i32", "Targets": "*i64", "Inds": "*i64"}
    types |= {"grad_scale": "fp32", "filter_eps": "fp32"}
    sizes = ("B", "V", "D", "B_BIN", "num_locks", "n_de_locks_0", "n_de_locks_1", "n_dc_locks_0", "n_dc_locks_1")
    types |= dict.fromkeys((*sizes, "stride_eb", "stride_cv"), "i32")
    constants: dict[str, Any] = dict.fromkeys(("LA", "Valids", "VocabOrdering", "softcap"))
    constants |= dict.fromkeys(("stride_ed", "stride_cd", "stride_lse_b", "stride_vb", "stride_ib"), 1)
    constants |= dict.fromkeys(("HAS_VALIDS", "HAS_SOFTCAP", "HAS_LA", "HAS_VOCAB_ORDERING", "SHIFT"), False)
    constants |= dict.fromkeys(("EVEN_D", "MM_BACK_EVEN_D", "FILTER_GRAD", "HAS_TARGETS", "REQUIRES_GRAD"), True)
    constants |= {"GROUP_B": 8, "DOT_PRECISION": "ieee", "ITEM_DO": False}
    found = []
    for name, kernel, config in (
        ("cce-forward", cce_lse_forward._cce_lse_forward_kernel, tl_autotune._cce_forward_best_config()),
        ("cce-indexed-dot", indexed_dot._indexed_neg_dot_forward_kernel, tl_autotune._indexed_dot_best_config()),
        ("cce-backward", cce_backward._cce_backward_kernel, tl_autotune._cce_backward_best_config()),
    ):
        while hasattr(kernel, "fn") and not hasattr(kernel, "signature"):
            kernel = kernel.fn
        block = config.kwargs
        rows, columns = block["BLOCK_B"], block.get("BLOCK_V", 1)
        share = 1 if columns > 1 else block["BLOCK_D"] / HIDDEN
        own = constants | block | {"MM_BACK_BLOCK_D": 2 * block["BLOCK_D"]}
        found.append(
            _variant(
                name,
                kernel,
                types,
                own,
                rows * columns * share / (config.num_warps * warp_size),
                config.num_warps,
                config.num_stages,
                ("D", "V", "B", "B_BIN", "stride_eb", "stride_cv"),
                kind="peer-gemm",
                hidden=HIDDEN,
                bytes_per_logit=(rows + columns) * HIDDEN * 2 / (rows * columns),
            )
        )
    return found


def static_variants(target: str) -> list[PeerVariant]:
    """Kernels of the installed peers for a target of gpu_static."""
    warp_size = 64 if target.startswith("gfx") else 32
    makers = {
        "liger-kernel": (_liger_grpo, _liger_cross_entropy),
        "trl": (_trl, _trl_chunked),
        "cut-cross-entropy": (_cut_cross_entropy,),
    }
    return [
        variant
        for package, functions in makers.items()
        if not missing(package)
        for maker in functions
        for variant in maker(warp_size)
    ]
