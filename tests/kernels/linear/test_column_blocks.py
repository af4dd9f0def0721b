"""Logits that are formed in several blocks of columns, with a low-rank part of the head."""

from __future__ import annotations

import pytest
import torch

from repo_kernels import LoraHead, linear_repo_loss, linear_selective_log_softmax
from repo_kernels.losses.heads import gemm

from .test_linear import relative
from .test_lora import SCALING


@pytest.mark.parametrize("rank", [2, 60])
@pytest.mark.parametrize("vocabulary", [512, 513, 1100])
def test_logits_in_several_blocks_of_columns_are_those_of_the_merged_weight(vocabulary: int, rank: int) -> None:
    assert torch.get_num_threads() * gemm.BLOCK_COLUMNS <= 512
    torch.manual_seed(0)
    hidden, base = torch.randn(6, 8), torch.randn(vocabulary, 8)
    a, b = torch.randn(rank, 8), torch.randn(vocabulary, rank)
    ids, ones = torch.randint(0, vocabulary, (6,)), torch.ones(6)
    found, exact = ([x.to(dtype).requires_grad_() for x in (hidden, a, b)] for dtype in (torch.float32, torch.float64))
    loss = linear_repo_loss(found[0], LoraHead(base, found[1], found[2], SCALING), ids, None, ones).loss
    whole = base.double() + SCALING * exact[2] @ exact[1]
    logps = (exact[0] @ whole.t()).log_softmax(-1)[torch.arange(6), ids]
    assert torch.allclose(
        linear_selective_log_softmax(hidden, LoraHead(base, a, b, SCALING), ids).double(), logps, rtol=1e-5, atol=1e-4
    )
    gradients = zip(torch.autograd.grad(loss, found), torch.autograd.grad(-logps.mean(), exact), strict=True)
    assert all(relative(got, value) <= 1e-4 for got, value in gradients)
