"""A head with a LoRA adapter gives what its merged weight gives, without a gradient of the base."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from repo_kernels import LinearRepoLoss, LoraHead, linear_repo_loss, linear_selective_log_softmax
from repo_kernels.losses.heads import gemm, linear, low_rank
from repo_kernels.losses.heads.chunks import Budget, HeadSizes, row_stride
from tests.support.kernels.cases import Batch, loss_arguments, make_batch
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

from .test_linear import FORMS, make_arguments, relative

VOCABULARY, WIDTH, RANK, SCALING = 19, 6, 3, 0.7
NAMES = ("hidden", "bias", "lora_A", "lora_B")


def make_leaves(
    batch: Batch, dtype: torch.dtype = torch.float32, rank: int = RANK, width: int = WIDTH
) -> tuple[Tensor, list[Tensor]]:
    """The base and [hidden, bias, lora_A, lora_B] that require grad; NaN on dead rows of hidden."""
    vocabulary = batch.logits.shape[-1]
    base = batch.normal(vocabulary, width, scale=width**-0.5).to(dtype)
    leaves = [
        batch.normal(*batch.leading, width).masked_fill(batch.dead[..., None], torch.nan),
        batch.normal(vocabulary, scale=0.1),
        batch.normal(rank, width, scale=width**-0.5),
        batch.normal(vocabulary, rank, scale=0.5),
    ]
    return base, [x.to(dtype).requires_grad_() for x in leaves]


def exact(base: Tensor, leaves: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """[loss, gradients of hidden, bias, lora_A and lora_B] in float64, from the merged weight."""
    wide = [x.detach().double().nan_to_num(0.0).requires_grad_() for x in leaves]
    hidden, bias, a, b = wide
    expected = oracle_loss(hidden @ (base.double() + SCALING * b @ a).T + bias, **arguments)
    up = torch.full_like(expected.loss, 0.5).detach()
    return [expected.loss.detach(), *(oracle_gradient(expected, x, up) for x in wide)]


def adapted(base: Tensor, leaves: list[Tensor], **keywords: Any) -> list[Tensor]:
    """The same of linear_repo_loss and a LoraHead."""
    hidden, bias, a, b = leaves
    loss = linear_repo_loss(hidden, LoraHead(base, a, b, SCALING), bias=bias, **keywords).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))]


@pytest.mark.parametrize("rank", [1, RANK])
@pytest.mark.parametrize("form", FORMS)
def test_every_backend_agrees_with_the_merged_weight(form: str, rank: int, backend: str) -> None:
    batch = make_batch(70, lengths=[4, 0, 5], vocabulary=VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch, rank=rank)
    mine, arguments = make_arguments(batch, **FORMS[form])
    for got, value in zip(adapted(base, leaves, **mine, chunk_tokens=3), exact(base, leaves, arguments), strict=True):
        assert relative(got, value) <= 1e-5


@pytest.mark.parametrize("options", [*FORMS.values(), {"surrogate": "cispo"}, {"ratio_level": "sequence"}])
def test_in_fp64_it_is_the_dense_loss_of_the_merged_weight(options: dict[str, Any]) -> None:
    batch = make_batch(71, lengths=[4, 0, 5], vocabulary=VOCABULARY)
    base, leaves = make_leaves(batch, torch.float64)
    mine, _ = make_arguments(batch, **options)
    mine = {k: v.double() if k in ("ref_hidden", "ref_weight") else v for k, v in mine.items()}
    hidden, bias, a, b = leaves
    results = []
    for weight in (LoraHead(base, a, b, SCALING), base + SCALING * b @ a):
        loss = linear_repo_loss(hidden, weight, bias=bias, **mine, chunk_tokens=2).loss.sum()
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, value in zip(*results, strict=True):
        assert relative(got, value) <= 1e-10


@pytest.mark.parametrize(
    ("leading", "vocabulary", "rank", "dead"),
    [((1,), 1, 1, 0.0), ((1, 6), 13, 1, 0.3), ((2, 3), 8, 9, 2.0), ((5,), 1, 2, 0.0), ((0,), 4, 2, 0.0)],
)
def test_one_token_one_sequence_one_word_rank_one_and_nothing_live(
    leading: tuple[int, ...], vocabulary: int, rank: int, dead: float, backend: str
) -> None:
    batch = make_batch(72, leading, vocabulary, dtype=torch.float32, dead=dead)
    base, leaves = make_leaves(batch, rank=rank)
    arguments = loss_arguments(batch, reference="k3", beta=0.3, entropy_coef=0.1)
    results, expected = adapted(base, leaves, **arguments), exact(base, leaves, arguments)
    for got, value in zip(results, expected, strict=True):
        assert got.shape == value.shape
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=1e-6)
    if dead > 1:
        assert not any(x.count_nonzero() for x in results)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean", "none"])
def test_gradient_of_the_loss(loss_agg_mode: str) -> None:
    batch = make_batch(73, lengths=[3, 2], vocabulary=5, dead=0.0)
    base, leaves = make_leaves(batch, torch.float64, rank=2, width=3)
    arguments = loss_arguments(
        batch, loss_agg_mode=loss_agg_mode, entropy_coef=0.1, softcap=4.0, reference="k3", beta=0.3
    )

    def loss(hidden: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_repo_loss(hidden, LoraHead(base, a, b, -1.5), bias=bias, **arguments, chunk_tokens=2).loss

    assert gradcheck(loss, leaves, atol=1e-7, rtol=1e-5)


def test_gradient_of_log_probabilities_and_entropy() -> None:
    batch = make_batch(74, (2, 3), 5, dead=0.0)
    base, leaves = make_leaves(batch, torch.float64, rank=2, width=3)

    def both(hidden: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Any:
        head, ids = LoraHead(base, a, b, SCALING), batch.token_ids
        return linear_selective_log_softmax(hidden, head, ids, bias=bias, temperature=0.8, return_entropy=True)

    assert gradcheck(both, leaves)


@pytest.mark.parametrize(
    "frozen", [{"lora_A"}, {"lora_B"}, {"hidden"}, {"hidden", "lora_A"}, {"hidden", "bias", "lora_B"}]
)
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_a_frozen_part_leaves_the_other_gradients_as_they_were(frozen: set[str], loss_agg_mode: str) -> None:
    batch = make_batch(75, (2, 4), VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    _, *expected = adapted(base, leaves, **arguments)
    partly = [x.detach().requires_grad_(name not in frozen) for name, x in zip(NAMES, leaves, strict=True)]
    hidden, bias, a, b = partly
    loss = linear_repo_loss(hidden, LoraHead(base, a, b, SCALING), bias=bias, **arguments).loss
    loss.backward(torch.full_like(loss, 0.5))
    for name, leaf, gradient in zip(NAMES, partly, expected, strict=True):
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, gradient)


# thin products over the vocabulary: the logits, dL/d(h A^T) for hidden and A, and dL/dB
@pytest.mark.parametrize(
    ("trained", "whole", "thin"),
    [
        (NAMES, 2, 3),
        (("hidden", "lora_B"), 2, 3),
        (("hidden", "lora_A"), 2, 2),
        (("lora_A", "lora_B"), 1, 3),
        (("lora_B",), 1, 2),
        (("lora_A",), 1, 2),
        ((), 1, 1),
    ],
)
def test_what_is_frozen_costs_no_gemm(
    trained: tuple[str, ...], whole: int, thin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[set[int]] = []

    def spy(name: str) -> Callable[..., Any]:
        real = getattr(gemm, name)

        def call(a: Tensor, b: Tensor, *out: Tensor) -> Tensor | None:
            sizes.append({*a.shape, *b.shape})
            return real(a, b, *out)

        return call

    for module in (linear, low_rank):
        for name in ("product", "new_product", "add_product", "add_thin_product", "add_outer", "add_inner"):
            monkeypatch.setattr(module, name, spy(name), raising=False)
    batch = make_batch(76, (10,), VOCABULARY, dtype=torch.float32, dead=0.0)
    base, leaves = make_leaves(batch)
    hidden, bias, a, b = (x.detach().requires_grad_(name in trained) for name, x in zip(NAMES, leaves, strict=True))
    linear_repo_loss(hidden, LoraHead(base, a, b, SCALING), bias=bias, **loss_arguments(batch))
    assert sizes.count({10, WIDTH, VOCABULARY}) == whole
    assert sizes.count({10, RANK, VOCABULARY}) == thin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_hidden_states_meet_an_fp32_adapter_whose_gradient_is_never_rounded(dtype: torch.dtype) -> None:
    batch = make_batch(77, (3, 4), VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch)
    base, leaves[0] = base.to(dtype), leaves[0].detach().to(dtype).requires_grad_()
    arguments = loss_arguments(batch, reference="k3", beta=0.3)
    results = adapted(base, leaves, **arguments, chunk_tokens=5)
    assert [x.dtype for x in results[1:]] == [dtype] + [torch.float32] * 3
    limits = (1e-5, 4e-3, 1e-5, 1e-5, 1e-5)
    for got, value, limit in zip(results, exact(base, leaves, arguments), limits, strict=True):
        assert relative(got, value) <= limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_factors_in_half_precision_do_not_underflow(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The types of a GPU, on the CPU. Gradients of a loss divided by 2^30 do not fit in fp16, but in fp32 sums."""
    monkeypatch.setattr(linear, "factor_dtype", lambda source, device, result: source)
    batch = make_batch(78, (24,), VOCABULARY, dtype=torch.float32, dead=0.2)
    base, leaves = make_leaves(batch)
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    arguments, tiny = loss_arguments(batch, loss_agg_mode="none", on_policy=True), 2.0**-30
    _, _, _, *expected = exact(base, leaves, arguments)
    hidden, bias, a, b = leaves
    head = LoraHead(base, a, b, SCALING)
    loss = linear_repo_loss(hidden, head, bias=bias, **arguments, chunk_tokens=5, backend="eager").loss
    for got, value in zip(torch.autograd.grad(loss, (a, b), torch.full_like(loss, 0.5 * tiny)), expected, strict=True):
        assert relative(got / tiny, value) <= limit
    kept = low_rank.LowRank.of(a, b, torch.ones(()), factors=dtype, result=torch.float32)
    assert kept is not None
    assert torch.equal(kept.a, a)  # no product over V takes A, so that it is not rounded


def test_the_module_takes_the_head_of_a_peft_layer() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, VOCABULARY))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    batch = make_batch(79, (2, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    hidden, arguments = batch.normal(2, 4, WIDTH).requires_grad_(), loss_arguments(batch)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = oracle_loss(layer(hidden).double(), **arguments).loss
    expected.backward()
    gradients = [x.grad.clone() for x in (hidden, a, b)]
    hidden.grad = a.grad = b.grad = None
    head = LoraHead(layer.base_layer.weight, a, b, layer.scaling["default"])
    loss = LinearRepoLoss()(hidden, head, bias=layer.base_layer.bias, **without_options(arguments)).loss
    loss.backward()
    assert relative(loss.detach(), expected.detach()) <= 1e-5
    assert layer.base_layer.weight.grad is None
    for leaf, gradient in zip((hidden, a, b), gradients, strict=True):
        assert relative(leaf.grad, gradient.double()) <= 1e-5
    with pytest.raises(
        TypeError, match=r"weight must be a tensor; got a module, Linear: pass LoraHead of its base_layer"
    ):
        linear_repo_loss(hidden, layer, **arguments)


def without_options(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k not in ("cost_mode", "loss_agg_mode")}


def make_head(**changed: Any) -> LoraHead:
    whole = LoraHead(torch.zeros(5, 4), torch.zeros(2, 4), torch.zeros(5, 2), 1.0)
    return dataclasses.replace(whole, **changed)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"base": [1.0]}, TypeError, r"weight\.base must be a tensor of float32, shape \(0, 4\); got \[1.0\]"),
    ({"base": torch.nn.Linear(4, 5)}, TypeError, r"weight\.base must be a tensor; got a module, Linear"),
    ({"base": torch.zeros(5, 3)}, ValueError, r"weight\.base must have shape \(V, 4\)"),
    ({"base": torch.zeros(0, 4)}, ValueError, r"weight\.base must have shape \(V, 4\) with V >= 1"),
    ({"base": torch.zeros(5, 4).bfloat16()}, TypeError, r"weight\.base must be a tensor of float32"),
    ({"base": torch.zeros(5, 4, requires_grad=True)}, ValueError, r"weight\.base must be frozen.*base\.detach\(\)"),
    ({"lora_A": None}, TypeError, r"weight\.lora_A must be a tensor of float32, shape \(1, 4\); got None"),
    ({"lora_A": torch.zeros(2, 3)}, ValueError, r"weight\.lora_A must have shape \(2, 4\)"),
    ({"lora_A": torch.zeros(0, 4)}, ValueError, r"weight\.lora_A must have shape \(r, H\) with r >= 1"),
    ({"lora_A": torch.zeros(4)}, ValueError, r"weight\.lora_A must have shape \(4, 4\); got float32 of shape \(4,\)"),
    ({"lora_A": torch.zeros(2, 4).double()}, TypeError, r"weight\.lora_A must be a tensor of float32"),
    ({"lora_A": torch.zeros(2, 4, device="meta")}, ValueError, r"weight\.lora_A must be on cpu"),
    (
        {"lora_B": torch.zeros(2, 5)},
        ValueError,
        r"weight\.lora_B must have shape \(5, 2\); got float32 of shape \(2, 5\)",
    ),
    ({"lora_B": torch.zeros(5, 3)}, ValueError, r"weight\.lora_B must have shape \(5, 2\)"),
    ({"lora_B": torch.zeros(5, 2).half()}, TypeError, r"weight\.lora_B must be a tensor of float32"),
    ({"scaling": math.nan}, ValueError, r"weight\.scaling must be finite.*got nan"),
    ({"scaling": math.inf}, ValueError, r"weight\.scaling must be finite.*got inf"),
    ({"scaling": "2"}, TypeError, r"weight\.scaling must be a float or a 0-d tensor, finite; got '2'"),
    ({"scaling": torch.ones(1)}, ValueError, r"weight\.scaling as a tensor must be 0-d and numeric"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_a_wrong_field_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, ids, head = torch.zeros(3, 4, requires_grad=True), torch.arange(3), make_head(**changed)
    with pytest.raises(error, match=message):
        linear_repo_loss(hidden, head, ids, None, torch.ones(3))
    with pytest.raises(error, match=message):
        linear_selective_log_softmax(hidden, head, ids)


def test_other_wrong_arguments_with_an_adapter_are_named() -> None:
    hidden, ids, ones = torch.zeros(3, 4), torch.arange(3), torch.ones(3)
    with pytest.raises(TypeError, match=r"^ref_weight must be a tensor of float32"):
        linear_repo_loss(hidden, make_head(), ids, None, ones, ref_hidden=hidden, ref_weight=make_head())
    with pytest.raises(ValueError, match=r"^ref_weight must have V = 5 rows like weight"):
        linear_repo_loss(hidden, make_head(), ids, None, ones, ref_hidden=hidden, ref_weight=torch.zeros(6, 4))
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        linear_repo_loss(hidden, make_head(), ids + 3, None, ones, backend="eager")
    with pytest.raises(ValueError, match=r"^bias must have shape \(5,\)"):
        linear_selective_log_softmax(hidden, make_head(), ids, bias=torch.zeros(4))
    freed = torch.zeros(5, 2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="lora_B must be a tensor with memory"):
        linear_repo_loss(hidden, make_head(lora_B=freed), ids, None, ones)


def test_a_base_that_requires_grad_is_taken_where_no_gradient_is_recorded() -> None:
    hidden, ids = torch.randn(3, 4), torch.arange(3)
    head = make_head(base=torch.randn(5, 4, requires_grad=True))
    with torch.no_grad():
        logps = linear_selective_log_softmax(hidden, head, ids)
    expected = torch.log_softmax(hidden @ head.base.detach().T, -1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)


def test_the_budget_of_a_chunk_counts_the_adapter() -> None:
    vocabulary, width, rank = 50_257, 8, 4
    dense = HeadSizes(vocabulary, width, torch.float32, torch.float32, with_weight=False)
    head = dataclasses.replace(dense, rank=rank)
    assert head.row_bytes == dense.row_bytes + 2 * 4 * rank
    assert head.weight_bytes == 4 * rank * (vocabulary + width)
    assert head.peak_bytes(100, 7) == dense.peak_bytes(100, 7) + 7 * 2 * 4 * rank + head.weight_bytes
    half = dataclasses.replace(head, factors=torch.bfloat16)
    assert half.row_bytes == (4 + 2) * row_stride(vocabulary) + 2 * 4 * width + 2 * 4 * rank
    assert dataclasses.replace(head, with_gradient=False).weight_bytes == 0
    assert Budget("cpu", size=3 * head.row_bytes).rows(10, head) == 3  # chunks of 3, 3, 3, 1 become even
    small = HeadSizes(49_152, 576, torch.float32, torch.float32, with_weight=False, rank=16)
    assert Budget("cpu").rows(1024, small) == 256  # 64 MB are 321 rows, in four chunks
    tensors = linear.LinearHead.of(
        torch.zeros(1, 8),
        torch.zeros(9, 8),
        None,
        torch.zeros(4, 8),
        torch.zeros(9, 4),
        torch.ones(()),
        result=torch.float32,
    )
    assert tensors.sizes(torch.float32, 1, True, False).rank == rank
