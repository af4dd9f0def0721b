"""varlen_attn of PyTorch as an operator that torch.compile knows, on the CPU: the real one computes on CUDA alone."""

import torch
from torch import Tensor

from tests.attention.signatures import by_sdpa


@torch.library.custom_op("repo_tests::varlen", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, left: int
) -> Tensor:
    return by_sdpa(q, k, v, cu_q, cu_k, max_q, max_k, scale, (left, 0)).contiguous()


@_varlen.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, left):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("repo_tests::varlen_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float,
    left: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        hidden = (distance < 0) | (distance > left if left >= 0 else False)
        for head in range(q.shape[1]):
            a, b, c, d = q[q0:q1, head], k[k0:k1, head // group], v[k0:k1, head // group], grad[q0:q1, head]
            p = (a @ b.T * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            slope = d @ c.T
            ds = p * (slope - (slope * p).sum(-1, keepdim=True)) * scale
            dq[q0:q1, head] += ds @ b
            dk[k0:k1, head // group] += ds.T @ a
            dv[k0:k1, head // group] += p.T @ d
    return dq, dk, dv


@_varlen_backward.register_fake
def _(grad, q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx, grad):
    return *_varlen_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


_varlen.register_autograd(_backward, setup_context=_save)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """Compute attention with the signature of torch 2.12 to 2.14."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])
