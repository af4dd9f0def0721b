"""Recorded signatures of varlen functions, parameter by parameter as each release has them; they compute by SDPA.

Read from the wheels of torch 2.10.0 to 2.14.0 and flash-attn-4 4.0.0b36, and from the sources of flash-attn
2.8.3.post2, which hold version 3 too.
"""

import torch
import torch.nn.functional as F


def by_sdpa(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap=0.0):
    """Compute causal attention of each sequence and check what every version requires."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert window[1] in (0, -1, None)
    out = []
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        seen = distance >= 0
        if window[0] not in (-1, None):
            seen &= distance <= window[0]
        parts = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        if softcap:
            parts[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in parts[1:]]
            scores = softcap * torch.tanh(parts[0] @ parts[1].transpose(2, 3) * (scale / softcap))
            one = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ parts[2]
        else:
            one = F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True)
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


def same_heads(query, key):
    if query.shape[1] != key.shape[1]:
        raise RuntimeError("grouped heads need enable_gqa")


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    same_heads(query, key)
    assert is_causal
    scale = query.shape[-1] ** -0.5
    return by_sdpa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, (-1, 0))


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    same_heads(query, key)
    assert window_size[1] == 0
    return by_sdpa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """The same up to 2.14."""
    if not enable_gqa:
        same_heads(query, key)
    assert window_size[1] == 0
    return by_sdpa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None):  # fmt: skip
    assert causal
    assert deterministic
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return by_sdpa(q, k, v, *lengths, softmax_scale, window_size, softcap)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert causal
    assert deterministic
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return by_sdpa(q, k, v, *lengths, softmax_scale, window_size, softcap)


def flash_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
            softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
            pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
            block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
            seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None):  # fmt: skip
    """Returns a tuple, of which the second is the log-sum-exp or None."""
    assert causal
    assert deterministic
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return by_sdpa(q, k, v, *lengths, softmax_scale, window_size, softcap), None


TORCH = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12, "2.13": torch_2_12, "2.14": torch_2_12}
FLASH = {"2": flash_2, "3": flash_3, "4": flash_4}
