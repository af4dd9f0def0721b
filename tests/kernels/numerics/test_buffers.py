"""Numerics, continued: gradient buffers, in-place and retained (10), and reproducible bits (14)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.cases import AGGREGATIONS, loss_arguments, make_batch

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_case_10_in_place_gives_the_same_bits(loss_agg_mode: str, dtype: torch.dtype) -> None:
    batch = make_batch(20, (3, 5), 9, dtype=dtype)
    arguments = loss_arguments(
        batch, reference="full", beta=0.3, entropy_coef=0.1, lam=1.0, loss_agg_mode=loss_agg_mode
    )
    results = []
    for inplace in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        out = repo_loss(leaf * 1, **arguments, inplace=inplace)
        out.loss.backward(torch.full_like(out.loss, 0.3))
        results.append((out.loss, out.logps, out.entropy, out.kl, out.stats.tensor, leaf.grad))
    for apart, over in zip(*results, strict=True):
        assert torch.equal(apart.nan_to_num(0.0), over.nan_to_num(0.0))


def test_case_10_in_place_takes_no_second_buffer() -> None:
    batch = make_batch(21, (3, 5), 9, dtype=torch.float32)
    logits = batch.logits.clone().requires_grad_()
    before = logits.detach().clone()
    scores = logits * 1
    out = repo_loss(scores, **loss_arguments(batch), inplace=True)
    assert not torch.equal(scores.detach().nan_to_num(0.0), before.nan_to_num(0.0))
    (gradient,) = torch.autograd.grad(out.loss, scores)
    assert gradient.data_ptr() == scores.data_ptr()


def test_case_10_in_place_on_a_view_leaves_the_rest_of_the_base_alone() -> None:
    batch = make_batch(22, (3, 5), 9, dtype=torch.float32)
    leaf = batch.normal(3, 6, 9).requires_grad_()
    arguments = loss_arguments(batch)
    (expected,) = torch.autograd.grad(repo_loss((leaf * 1)[:, :-1], **arguments).loss, leaf)
    base = leaf * 1
    out = repo_loss(base[:, :-1], **arguments, inplace=True)
    assert torch.equal(base[:, -1], leaf[:, -1])
    (got,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(got, expected)


def test_case_10_a_producer_that_needs_its_output_notices_the_overwrite() -> None:
    batch = make_batch(23, (3, 5), 9, dtype=torch.float32, dead=0.0)
    leaf = batch.logits.clone().requires_grad_()
    scores = leaf.exp()
    version = scores._version
    out = repo_loss(scores, **loss_arguments(batch), inplace=True)
    assert scores._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_case_10_logits_modified_after_the_forward_are_noticed() -> None:
    batch = make_batch(24, (3, 5), 9, dtype=torch.float32)
    scores = batch.logits.clone().requires_grad_() * 1
    out = repo_loss(scores, **loss_arguments(batch), inplace=True)
    scores.detach().zero_()
    with pytest.raises(RuntimeError, match="modified"):
        out.loss.backward()


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_case_10_a_consumed_buffer_refuses_a_second_backward(loss_agg_mode: str) -> None:
    batch = make_batch(25, (3, 5), 9, dtype=torch.float32)
    scores = batch.logits.clone().requires_grad_() * 1
    loss = repo_loss(scores, **loss_arguments(batch, loss_agg_mode=loss_agg_mode), inplace=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed"):
        loss.backward(retain_graph=True)


def test_case_10_a_graph_not_retained_refuses_a_second_backward() -> None:
    batch = make_batch(25, (3, 5), 9, dtype=torch.float32)
    logits = batch.logits.clone().requires_grad_()
    loss = repo_loss(logits, **loss_arguments(batch)).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_case_10_in_place_refuses_logits_that_share_memory_with_themselves() -> None:
    batch = make_batch(26, (6,), 9, dtype=torch.float32, dead=0.0)
    arguments = loss_arguments(batch, per_sequence=False)
    row = batch.normal(1, 9).requires_grad_()
    with pytest.raises(ValueError, match=r"logits must not overlap.*stride"):
        repo_loss((row * 1).expand(6, 9), **arguments, inplace=True)


def test_case_10_in_place_refuses_rows_that_overlap() -> None:
    batch = make_batch(26, (6,), 9, dtype=torch.float32, dead=0.0)
    arguments = loss_arguments(batch, per_sequence=False)
    overlapping = (batch.normal(30).requires_grad_() * 1).unfold(0, 9, 4)
    assert overlapping.shape == (6, 9)
    with pytest.raises(ValueError, match=r"logits must not"):
        repo_loss(overlapping, **arguments, inplace=True)


def test_case_10_in_place_is_refused_in_a_whole_graph() -> None:
    batch = make_batch(27, (2, 3), 5, dtype=torch.float32)
    arguments = loss_arguments(batch)
    compiled = torch.compile(lambda z: repo_loss(z, **arguments, inplace=True).loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="use inplace=False|<class 'ValueError'>"):  # torch 2.8 names the type alone
        compiled(batch.logits.clone().requires_grad_() * 1)


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_case_10_a_retained_graph_gives_the_same_bits_again(form: str, loss_agg_mode: str) -> None:
    batch = make_batch(28, lengths=[4, 0, 6], vocabulary=9, dtype=torch.float32)
    arguments = loss_arguments(batch, reference="k3", beta=0.3, lam=1.0, loss_agg_mode=loss_agg_mode)
    if form == "logits":
        leaves = (batch.logits.clone().requires_grad_(),)
        loss = repo_loss(*leaves, **arguments).loss
    else:
        leaves = (batch.normal(10, 4).requires_grad_(), batch.normal(9, 4).requires_grad_())
        loss = linear_repo_loss(*leaves, **arguments, chunk_tokens=3).loss
    upstream = torch.full_like(loss, 0.3)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    other = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, upstream)
    for a, b, c in zip(kept, again, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)


SECOND_ORDER = {
    "loss": lambda z, ids, one: repo_loss(z, ids, None, one).loss,
    "in place": lambda z, ids, one: repo_loss(z * 1, ids, None, one, inplace=True).loss,
    "log-probs": lambda z, ids, one: selective_log_softmax(z, ids).sum(),
    "linear loss": lambda z, ids, one: linear_repo_loss(z, torch.eye(9, device=z.device), ids, None, one).loss,
    "linear log-probs": lambda z, ids, one: linear_selective_log_softmax(z, torch.eye(9), ids).sum(),
}


@pytest.mark.parametrize("form", SECOND_ORDER)
def test_a_gradient_of_the_gradient_is_refused_and_not_taken_for_zero(form: str) -> None:
    logits, ids = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    loss = SECOND_ORDER[form](logits, ids, torch.ones(4))
    with pytest.raises(RuntimeError, match="can be differentiated once: create_graph=True is not supported"):
        torch.autograd.grad(loss, logits, create_graph=True)
    parameter = torch.nn.Parameter(logits.detach())
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(SECOND_ORDER[form](parameter, ids, torch.ones(4)), parameter, create_graph=True)


@pytest.mark.parametrize("form", SECOND_ORDER)
def test_a_gradient_is_a_plain_tensor(form: str) -> None:
    logits, ids = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    for retain in (True, False):
        (gradient,) = torch.autograd.grad(
            SECOND_ORDER[form](logits, ids, torch.ones(4)), logits, torch.tensor(0.5), retain_graph=retain
        )
        assert not gradient.requires_grad
        assert gradient.numpy().any()


def test_log_probabilities_may_be_masked_in_place() -> None:
    logits, ids = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    logps = selective_log_softmax(logits, ids).masked_fill_(ids == 2, 0.0)
    logps.sum().backward()
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_what_arrives_at_a_dead_row_does_not_reach_its_gradient(inplace: bool) -> None:
    batch = make_batch(34, (3, 5), 9, dtype=torch.float32)
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits * 1, **loss_arguments(batch, loss_agg_mode="none"), inplace=inplace)
    out.loss.backward(torch.where(batch.dead, torch.inf, 0.5))
    assert (logits.grad[batch.dead] == 0).all()
    assert logits.grad[~batch.dead].isfinite().all()
    assert (logits.grad != 0).any()


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        # a detached or reshaped alias of an input is not an allocation
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for x in outputs:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.seen.append(tuple(x.shape))
        return result


@pytest.mark.parametrize("trained", ["all", "hidden only", "nothing", "all under no_grad"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_the_gradient_of_the_weight_is_only_allocated_when_it_is_wanted(trained: str, loss_agg_mode: str) -> None:
    batch = make_batch(29, (3, 5), 31, dtype=torch.float32)
    hidden = batch.normal(3, 5, 6).requires_grad_(trained != "nothing")
    weight = batch.normal(31, 6).requires_grad_(trained in ("all", "all under no_grad"))
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    with Shapes() as shapes, torch.set_grad_enabled(trained != "all under no_grad"):
        loss = linear_repo_loss(hidden, weight, **arguments).loss.sum()
        if loss.requires_grad:
            loss.backward()
    assert ((31, 6) in shapes.seen) == (trained == "all")


def test_no_gradient_of_the_logits_is_allocated_under_no_grad() -> None:
    batch = make_batch(30, (3, 5), 31, dtype=torch.float32, dead=0.5)
    logits = batch.logits.clone().requires_grad_()
    arguments = loss_arguments(batch)
    with Shapes() as shapes, torch.no_grad():
        loss = repo_loss(logits, **arguments).loss
    assert not loss.requires_grad
    assert (3, 5, 31) not in shapes.seen


def gradients_of(logits: Tensor, arguments: dict) -> tuple[Tensor, ...]:
    """logps, entropy, per-token loss and gradient of repo_loss in mode "none"."""
    leaf = logits.clone().requires_grad_()
    out = repo_loss(leaf, **arguments)
    out.loss.sum().backward()
    return out.logps, out.entropy, out.kl, out.loss, leaf.grad


@pytest.mark.parametrize("reference", ["k3", "full"])
@pytest.mark.parametrize("vocabulary", [3, 17, 257, 4099, 50_257])
# the interpreter has one thread and is slow
@pytest.mark.leave_out(lambda backend, threads, vocabulary: backend == "triton" and (threads > 1 or vocabulary > 257))
def test_case_14_a_row_does_not_depend_on_the_batch_around_it(
    threads: int, vocabulary: int, reference: str, backend: str
) -> None:
    count = 40 if vocabulary == 50_257 else 90
    bounds = [(0, 1), (count - 1, count), (3, 5), (7, 20), (1, count)]
    if backend == "triton":
        # its sums are grouped from a row's first 16-byte boundary: the rows compared lie to it as they did
        count, bounds = 14, [(0, 1), (12, 13), (4, 6), (8, 14)]
    batch = make_batch(31, (count,), vocabulary, dtype=torch.float32, dead=0.1)
    arguments = loss_arguments(
        batch, reference=reference, beta=0.3, entropy_coef=0.1, per_sequence=False, loss_agg_mode="none", softcap=9.0
    )
    whole = gradients_of(batch.logits, arguments)
    for start, stop in bounds:
        part = {
            name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
            for name, value in arguments.items()
        }
        for mine, full in zip(gradients_of(batch.logits[start:stop], part), whole, strict=True):
            assert torch.equal(mine, full[start:stop])


@pytest.mark.leave_out(lambda backend: backend == "triton")  # a row per program: there are no chunks
def test_case_14_rows_are_the_same_bits_however_the_internal_chunks_fall(threads: int, backend: str) -> None:
    """400 rows of 50 257 entries are worked through in several pieces."""
    logits = torch.randn(20, 50_257).repeat(20, 1)
    ids = torch.arange(20).repeat(20)
    logps, entropy = selective_log_softmax(logits, ids, return_entropy=True)
    for values in (logps, entropy):
        assert torch.equal(values, values[:20].repeat(20))


@pytest.mark.parametrize("form", ["logits", "linear"])
def test_case_14_two_runs_give_the_same_bits(threads: int, form: str, backend: str) -> None:
    lengths = [7, 0, 13, 5] if backend == "triton" else [70, 0, 130, 57]
    batch = make_batch(32, lengths=lengths, vocabulary=1031, dtype=torch.float32)
    arguments = loss_arguments(
        batch, reference="k3", beta=0.3, entropy_coef=0.1, lam=1.0, loss_agg_mode="seq-mean-token-mean"
    )
    leaves = [batch.logits] if form == "logits" else [batch.normal(sum(lengths), 64), batch.normal(1031, 64)]
    runs = []
    for _ in range(3):
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        out = (repo_loss if form == "logits" else linear_repo_loss)(*mine, **arguments)
        out.loss.backward()
        runs.append((out.loss, out.logps, out.entropy, out.kl, out.stats.tensor, *(x.grad for x in mine)))
    for values in zip(*runs, strict=True):
        assert values[0].nan_to_num(0.0).abs().max() > 0
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[0], values[2])


def test_case_14_masked_rows_do_not_change_the_bits_of_the_others() -> None:
    batch = make_batch(33, (4, 6), 37, dtype=torch.float32, dead=0.0)
    arguments = loss_arguments(batch, entropy_coef=0.1, reference="k3", beta=0.1, loss_agg_mode="none")
    whole = gradients_of(batch.logits, arguments)
    mask = torch.rand(4, 6, generator=batch.generator) > 0.5
    masked = gradients_of(batch.logits, {**arguments, "response_mask": mask})
    for mine, full in zip(masked, whole, strict=True):
        assert torch.equal(mine[mask], full[mask])
        assert (mine[~mask] == 0).all()
