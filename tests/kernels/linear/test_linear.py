"""The linear forms beyond their agreement with the oracle: types, chunks, memory, tied weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import linear_repo_loss, linear_selective_log_softmax
from repo_kernels.backends import choice
from repo_kernels.backends.codes import SCALARS, STATS, TOKEN_SUM
from repo_kernels.backends.interface import Loss
from repo_kernels.layers import onednn_linear
from repo_kernels.losses.heads import gemm, linear
from repo_kernels.losses.heads.chunks import Budget
from tests.support.kernels.cases import Batch, loss_arguments, make_batch, row_arguments
from tests.support.kernels.operations import Operations
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

pytestmark = pytest.mark.pairwise

VOCABULARY, WIDTH = 19, 6
FORMS: dict[str, dict[str, Any]] = {
    "k3": {"reference": "k3", "beta": 0.3, "lam": 1.0, "entropy_coef": 0.1, "softcap": 8.0},
    "full KL": {"reference": "full", "beta": 0.2, "loss_agg_mode": "seq-mean-token-mean"},
    "per token": {"reference": "k2", "beta": 0.2, "loss_agg_mode": "none", "mode": "split", "cost_form": "given"},
}


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def make_head(batch: Batch, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight, bias that require grad; NaN on dead rows of hidden."""
    vocabulary = batch.logits.shape[-1]
    hidden = batch.normal(*batch.leading, WIDTH).masked_fill(batch.dead[..., None], torch.nan)
    leaves = (hidden, batch.normal(vocabulary, WIDTH, scale=WIDTH**-0.5), batch.normal(vocabulary, scale=0.1))
    return [x.to(dtype).requires_grad_() for x in leaves]


def make_arguments(batch: Batch, **form: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The loss's arguments in the linear form and those of the oracle on the product."""
    arguments = loss_arguments(batch, **form)
    mine = dict(arguments)
    if mine.pop("ref_logits", None) is not None:
        ref = batch.normal(*batch.leading, 3), batch.normal(batch.logits.shape[-1], 3)
        mine |= {"ref_hidden": ref[0], "ref_weight": ref[1]}
        arguments["ref_logits"] = ref[0].double() @ ref[1].double().T
    return mine, arguments


def exact(leaves: list[Tensor], arguments: dict[str, Any], upstream: float = 1.0) -> list[Tensor]:
    """[loss, gradients of hidden, weight, bias] in float64 from the materialised logits."""
    wide = [x.detach().double().nan_to_num(0.0).requires_grad_() for x in leaves]
    expected = oracle_loss(wide[0] @ wide[1].T + wide[2], **arguments)
    up = torch.full_like(expected.loss, upstream).detach()
    return [expected.loss.detach(), *(oracle_gradient(expected, x, up) for x in wide)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_hidden_states_meet_an_fp32_head_whose_gradient_is_never_rounded(
    form: str, dtype: torch.dtype, backend: str
) -> None:
    batch = make_batch(60, lengths=[4, 0, 5], vocabulary=VOCABULARY, dtype=torch.float32)
    leaves = make_head(batch)
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    mine, arguments = make_arguments(batch, **FORMS[form])
    expected = exact(leaves, arguments, 0.5)
    loss = linear_repo_loss(*leaves[:2], bias=leaves[2], **mine, chunk_tokens=3).loss
    loss.backward(torch.full_like(loss, 0.5))
    assert [x.grad.dtype for x in leaves] == [dtype, torch.float32, torch.float32]
    rounding = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert relative(loss.detach(), expected[0]) <= 1e-5
    for leaf, gradient, limit in zip(leaves, expected[1:], (rounding, 1e-5, 1e-5), strict=True):
        assert relative(leaf.grad, gradient) <= limit


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_products_of_mkl_and_of_onednn_give_the_same(
    form: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN linear operator")
    monkeypatch.setattr(onednn_linear, "mkl_is_slow", lambda: by_onednn)
    batch = make_batch(64, (3, 3), VOCABULARY, dtype=torch.float32)
    leaves = make_head(batch)
    mine, arguments = make_arguments(batch, **FORMS[form])
    expected = exact(leaves, arguments, 0.5)
    loss = linear_repo_loss(*leaves[:2], bias=leaves[2], **mine, chunk_tokens=4).loss
    loss.backward(torch.full_like(loss, 0.5))
    for got, value in zip((loss.detach(), *(leaf.grad for leaf in leaves)), expected, strict=True):
        assert relative(got, value) <= 1e-5


@pytest.fixture
def factors_stay_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The types of a GPU whose GEMM does not return fp32, on the CPU."""
    monkeypatch.setattr(linear, "factor_dtype", lambda source, device, result: source)


@pytest.mark.usefixtures("factors_stay_half")
@pytest.mark.parametrize("form", ["k3", "per token", "log-probs"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("by", ["eager", "triton"])  # the C++ backend never has half factors
def test_factors_in_half_precision_do_not_underflow(by: str, form: str, dtype: torch.dtype, limit: float) -> None:
    """A loss divided by 2^30 has gradients that fp16 cannot hold; fp32 sums hold them."""
    if by == "triton":
        pytest.importorskip("triton")
    batch = make_batch(61, (24,), VOCABULARY, dtype=torch.float32, dead=0.2)
    leaves = [x.detach().to(dtype).requires_grad_() for x in make_head(batch)]
    weight = leaves[1] = leaves[1].detach().float().requires_grad_()
    tiny = 2.0**-30
    if form == "log-probs":
        ids = batch.token_ids.masked_fill(batch.dead, -100)
        (linear_selective_log_softmax(*leaves[:2], ids, bias=leaves[2], backend=by).sum() * tiny).backward()
        hidden = leaves[0].detach().double().nan_to_num(0.0)
        wide = weight.detach().double().requires_grad_()
        logps = torch.log_softmax(hidden @ wide.T + leaves[2].detach().double(), -1)
        (expected,) = torch.autograd.grad(logps.gather(-1, ids.clamp(min=0)[:, None])[ids >= 0].sum() * tiny, wide)
    else:
        mine, arguments = make_arguments(batch, **FORMS[form], on_policy=True)
        expected = exact(leaves, arguments, tiny)[2]
        loss = linear_repo_loss(*leaves[:2], bias=leaves[2], **mine, chunk_tokens=5, backend=by).loss
        loss.backward(torch.full_like(loss, tiny))
    assert weight.grad.dtype == torch.float32
    assert relative(weight.grad, expected) <= limit


@pytest.mark.parametrize(("offered", "limit"), [(True, 1e-6), (False, 4e-3)])
def test_gemms_of_half_factors_return_fp32_where_the_device_offers_it(
    offered: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`out_dtype` is CUDA's; here it is played by PyTorch in fp32."""
    asked: list[torch.dtype] = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return a @ b
        asked.append(out_dtype)
        return torch.mm(a.float(), b.float(), out=out)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        asked.append(out_dtype)
        return torch.addmm(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(gemm, "returns_fp32", lambda device, factors: offered)
    monkeypatch.setattr(gemm, "torch", SimpleNamespace(mm=mm, addmm=addmm))
    a, b, total = torch.randn(9, 16).bfloat16(), torch.randn(16, 7).bfloat16(), torch.empty(9, 7)
    gemm.product(a, b, total)
    gemm.add_product(2 * a, b, total)
    assert relative(total, 3 * a.double() @ b.double()) <= limit
    assert asked == ([torch.float32] * 2 if offered else [])


def test_the_type_of_the_factors_is_that_of_the_hidden_states_on_cuda_and_of_the_sums_elsewhere() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for half in gemm.HALF:
        assert gemm.factor_dtype(half, cuda, torch.float32) == half
        assert gemm.factor_dtype(half, cpu, torch.float32) == torch.float32
        assert gemm.factor_dtype(half, cuda, torch.float64) == torch.float64
    assert gemm.factor_dtype(torch.float32, cuda, torch.float32) == torch.float32
    assert not gemm.returns_fp32(cpu, torch.bfloat16)


@pytest.mark.parametrize(("frozen", "gemms"), [(False, 3), (True, 2)])
def test_gemms_and_dead_rows(frozen: bool, gemms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only live rows enter a GEMM; a frozen head has two of them, a trained one three, the first of which writes."""
    sizes: list[tuple[str, int]] = []

    def spy(name: str) -> Any:
        whole = getattr(gemm, name)

        def call(a: Tensor, b: Tensor, *out: Tensor) -> Tensor | None:
            sizes.append((name, a.shape[0] * a.shape[1] * b.shape[1]))
            return whole(a, b, *out)

        return call

    for name in ("product", "new_product", "add_product"):
        monkeypatch.setattr(linear, name, spy(name))
    batch = make_batch(62, (3, 5), VOCABULARY, dtype=torch.float32, dead=0.6)
    hidden, weight, _ = make_head(batch)
    loss = linear_repo_loss(hidden, weight.requires_grad_(not frozen), **loss_arguments(batch), chunk_tokens=2).loss
    live = int((~batch.dead).sum())
    assert 2 < live < 15
    assert sum(size for _, size in sizes) == gemms * live * WIDTH * VOCABULARY
    assert [name for name, _ in sizes].count("add_product") == (0 if frozen else -(-live // 2) - 1)
    loss.backward()
    assert len(sizes) == gemms * -(-live // 2)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_tied_embeddings_get_the_sum_of_both_gradients(loss_agg_mode: str, backend: str) -> None:
    batch = make_batch(63, (2, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    table = batch.normal(VOCABULARY, WIDTH).requires_grad_()
    inputs = torch.randint(0, VOCABULARY, (2, 4), generator=batch.generator)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    linear_repo_loss(torch.tanh(table[inputs]), table, **arguments).loss.sum().backward()
    wide = table.detach().double().requires_grad_()
    expected = oracle_loss(torch.tanh(wide[inputs]) @ wide.T, **arguments)
    assert relative(table.grad, oracle_gradient(expected, wide, torch.ones_like(expected.loss).detach())) <= 1e-5


def test_hidden_states_need_not_be_contiguous() -> None:
    batch = make_batch(64, (3, 5), VOCABULARY, dtype=torch.float32, dead=0.0)
    base, weight, bias = batch.normal(3, 6, WIDTH), *make_head(batch)[1:]
    arguments = loss_arguments(batch)
    results = []
    for hidden in (base[:, :-1], base[:, :-1].contiguous()):
        leaf = hidden.detach().requires_grad_()
        loss = linear_repo_loss(leaf, weight, bias=bias, **arguments, chunk_tokens=4).loss
        results.append((loss, *torch.autograd.grad(loss, (leaf, weight, bias))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_fp32_head_is_for_half_hidden_states_and_a_half_one_for_those_of_its_type() -> None:
    ids, one = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for hidden, weight in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
    ):
        with pytest.raises(TypeError, match=r"^weight must be a tensor of float"):
            linear_repo_loss(torch.zeros(2, 3, dtype=hidden), torch.zeros(4, 3, dtype=weight), ids, None, one)
    with pytest.raises(TypeError, match=r"^weight must be a tensor of bfloat16 or float32"):
        linear_selective_log_softmax(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3).double(), ids)


def test_one_value_of_the_device_is_read_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows are live decides the chunks; a GPU is not waited for again."""
    stub = SimpleNamespace(
        prepare=lambda logits, loss: None,
        fused=lambda *arguments: None,
        reduce=lambda loss, prepared, results: (torch.zeros(()), torch.zeros(len(STATS))),
        scale_rows=lambda grad, upstream, flags: None,
    )
    monkeypatch.setattr(choice, "load", lambda backend: stub)
    ids, head = torch.tensor([1, -100, 2, 3]), linear.LinearHead(torch.randn(VOCABULARY, WIDTH), None)
    arguments = row_arguments(ids, reward_advantages=torch.ones(4), response_mask=torch.ones(4, dtype=torch.bool))
    loss = Loss(arguments, torch.ones(len(SCALARS)), TOKEN_SUM << 8, 0.0, 0)
    with Operations() as operations:
        linear.loss_chunks(
            torch.randn(4, WIDTH), head, None, loss, (True,) * 3, torch.ones(4), Budget("cpu", tokens=2), "stub"
        )
    waits = [name for name in operations.seen if name.split(".")[1] in ("nonzero", "_local_scalar_dense", "item")]
    assert waits == ["aten.nonzero.default"]
