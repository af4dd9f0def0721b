"""The Triton backend on a GPU: `make test-gpu`, which leaves the interpreter out."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from repo_kernels.losses.heads import gemm
from tests.kernels.linear.test_linear import FORMS as LINEAR_FORMS
from tests.kernels.linear.test_linear import exact
from tests.support.kernels.cases import Batch, loss_arguments, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a GPU and TRITON_INTERPRET=0 (`make test-gpu`)",
    ),
]

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k3, entropy": {"reference": "k3", "beta": 0.3, "lam": 1.0, "entropy_coef": 0.1},
    "full KL, softcap": {"reference": "full", "beta": 0.2, "softcap": 8.0, "loss_agg_mode": "seq-mean-token-mean"},
    "per token": {"reference": "k2", "beta": 0.2, "loss_agg_mode": "none", "mode": "split", "cost_form": "given"},
}
GRADIENT = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
LINEAR_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # factors of GEMMs are rounded too
HEADS = [*((dtype, dtype) for dtype in GRADIENT), (torch.bfloat16, torch.float32)]


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the device."""
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", [7, 4096, 32_000, 50_257, 151_936])
def test_loss_and_gradient_agree_with_fp64(vocabulary: int, form: str, dtype: torch.dtype) -> None:
    batch = make_batch(1, (3, 5), vocabulary, dtype=dtype)
    arguments = on_gpu(loss_arguments(batch, **FORMS[form]))
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    logits = batch.logits.cuda().requires_grad_()
    exact = batch.logits.cuda().double().requires_grad_()
    out = repo_loss(logits, **arguments, grad_scale=scale)
    out.loss.sum().backward()
    if "ref_logits" in arguments:
        arguments["ref_logits"] = arguments["ref_logits"].double()
    expected = repo_loss(exact, **arguments, backend="eager")
    expected.loss.sum().backward()
    assert relative(out.logps, expected.logps) <= 1e-6
    assert relative(logits.grad / scale, exact.grad) <= GRADIENT[dtype]
    again = batch.logits.cuda().requires_grad_()
    arguments["ref_logits"] = arguments["ref_logits"].to(dtype) if "ref_logits" in arguments else None
    inplace = repo_loss(again * 1, **arguments, grad_scale=scale, inplace=True)
    inplace.loss.sum().backward()
    assert torch.equal(again.grad, logits.grad)
    assert torch.equal(inplace.loss, out.loss)


def make_head(batch: Batch, hidden: torch.dtype, head: torch.dtype, width: int = 64) -> list[Tensor]:
    """hidden, weight, bias on the CPU; NaN on dead rows of hidden. GEMMs take weights rounded to hidden's type."""
    states = batch.normal(*batch.leading, width).masked_fill(batch.dead[..., None], torch.nan)
    vocabulary = batch.logits.shape[-1]
    weight = batch.normal(vocabulary, width, scale=width**-0.5)
    return [states.to(hidden), weight.to(hidden).to(head), batch.normal(vocabulary, scale=0.1).to(head)]


def leaves_on_gpu(head: list[Tensor], frozen: bool) -> list[Tensor]:
    """hidden, weight, bias as leaves on the device; only hidden requires grad where the head is frozen."""
    return [x.cuda().requires_grad_(not (frozen and i)) for i, x in enumerate(head)]


def value_limit(hidden: Tensor) -> float:
    """Of relative errors of losses and log-probabilities: a GEMM that cannot return fp32 rounds the logits."""
    exact_logits = hidden.dtype == torch.float32 or gemm.returns_fp32(hidden.device, hidden.dtype)
    return 1e-5 if exact_logits else GRADIENT[hidden.dtype]


def assert_gradients(leaves: list[Tensor], expected: list[Tensor]) -> None:
    """Those that are wanted, of the leaves' types and within the rounding of the hidden states."""
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert relative(leaf.grad.cpu(), gradient) <= LINEAR_GRADIENT[leaves[0].dtype]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("hidden", "head"), HEADS)
@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_the_linear_loss_and_its_gradients_agree_with_fp64(
    form: str, hidden: torch.dtype, head: torch.dtype, frozen: bool
) -> None:
    batch = make_batch(3, (4, 5), 1021, dtype=torch.float32)
    made, arguments = make_head(batch, hidden, head), loss_arguments(batch, **LINEAR_FORMS[form])
    leaves, mine = leaves_on_gpu(made, frozen), on_gpu(arguments)
    if mine.pop("ref_logits", None) is not None:
        states, weight, _ = make_head(batch, hidden, head, width=32)
        mine |= {"ref_hidden": states.cuda(), "ref_weight": weight.cuda()}
        arguments["ref_logits"] = states.double() @ weight.double().T
    expected = exact(made, arguments, 0.5)
    loss = linear_repo_loss(*leaves[:2], bias=leaves[2], **mine, chunk_tokens=6).loss
    loss.backward(torch.full_like(loss, 0.5))
    assert relative(loss.detach().cpu(), expected[0]) <= value_limit(leaves[0])
    assert_gradients(leaves, expected[1:])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("hidden", "head"), HEADS)
def test_linear_log_probs_and_their_gradients_agree_with_fp64(
    hidden: torch.dtype, head: torch.dtype, frozen: bool
) -> None:
    batch = make_batch(4, (4, 5), 1021, dtype=torch.float32)
    made = make_head(batch, hidden, head)
    ids = batch.token_ids.masked_fill(batch.dead, -100)
    leaves, upstream = leaves_on_gpu(made, frozen), batch.normal(*batch.leading)
    got = linear_selective_log_softmax(*leaves[:2], ids.cuda(), bias=leaves[2], temperature=0.7, chunk_tokens=6)
    got.backward(upstream.cuda())
    wide = [x.double().nan_to_num(0.0).requires_grad_() for x in made]
    logps = torch.log_softmax((wide[0] @ wide[1].T + wide[2]) / 0.7, -1)
    expected = logps.gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1).masked_fill(ids < 0, 0.0)
    assert relative(got.detach().cpu(), expected.detach()) <= value_limit(leaves[0])
    assert_gradients(leaves, list(torch.autograd.grad(expected, wide, upstream.double())))


@pytest.mark.parametrize("form", FORMS)
def test_case_13_there_is_no_host_sync(form: str) -> None:
    batch = make_batch(2, (3, 5), 4096, dtype=torch.bfloat16)
    arguments = on_gpu(loss_arguments(batch, **FORMS[form]))
    logits = batch.logits.cuda().requires_grad_()
    repo_loss(logits, **arguments).loss.sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arguments["lam"] = torch.full((), 2.0, device="cuda")
        repo_loss(logits, **arguments).loss.sum().backward()
        selective_log_softmax(logits, arguments["token_ids"].clamp(0, 4095), temperature=0.7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_case_11_other_lengths_widths_and_scalars_do_not_recompile() -> None:
    from repo_kernels.backends.triton import kernels

    sizes = []
    for rows, vocabulary, lam in ((1, 16_384, 0.0), (7, 16_383, 1.0), (64, 9_001, 2.5), (3, 1, 3.0)):
        logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        ids, ones = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.ones(rows, device="cuda")
        repo_loss(logits, ids, None, ones, costs=ones, lam=lam).loss.backward()
        sizes.append(len(kernels.fused.device_caches[torch.cuda.current_device()][0]))
    assert len(set(sizes)) == 1


def test_case_8_the_gradient_of_rows_beyond_two_to_the_31_elements_is_written_where_they_are() -> None:
    rows, vocabulary = 70_000, 32_768
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.randint(0, vocabulary, (rows,), device="cuda")
    repo_loss(logits, ids, None, torch.ones(rows, device="cuda"), loss_agg_mode="token-sum").loss.backward()
    few = logits.detach()[-3:].clone().requires_grad_()
    repo_loss(few, ids[-3:], None, torch.ones(3, device="cuda"), loss_agg_mode="token-sum").loss.backward()
    assert torch.equal(logits.grad[-3:], few.grad)
