"""LossOptions, RepoLoss and LinearRepoLoss: options are checked once, and modules give the bits of the functions."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repo_kernels import LinearRepoLoss, LossOptions, RepoLoss, RepoLossOutput, linear_repo_loss, repo_loss
from repo_kernels.losses import options as options_module
from tests.support.kernels.cases import loss_arguments, make_batch

NAMES = [field.name for field in fields(LossOptions)]

# field, refused value, error, what the message says that it takes
REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("cost_mode", "banana", ValueError, "'rectified', 'split', 'lagrangian'"),
    ("surrogate", "ppo", ValueError, "'clip', 'cispo'"),
    ("ratio_level", "word", ValueError, "'token', 'sequence'"),
    ("normalize", 1, TypeError, "a bool"),
    ("temperature", 0.0, ValueError, "> 0"),
    ("temperature", None, TypeError, "a float or a 0-d tensor"),
    ("softcap", -1.0, ValueError, "> 0 or None"),
    ("softcap", torch.tensor(30.0), TypeError, "a float or None"),
    ("eps_low", -0.1, ValueError, ">= 0"),
    ("eps_low", 1.5, ValueError, "[0, 1]"),
    ("eps_high", float("nan"), ValueError, ">= 0"),
    ("eps_high", "0.2", TypeError, "a float or a 0-d tensor"),
    ("dual_clip", 1.0, ValueError, "> 1 or None"),
    ("kl_estimator", "k4", ValueError, "'k1', 'k2', 'k3', 'full'"),
    ("kl_importance_weighted", None, TypeError, "a bool"),
    ("entropy_coef", float("inf"), ValueError, "finite"),
    ("entropy_coef", torch.ones(2), ValueError, "0-d"),
    ("loss_agg_mode", "mean", ValueError, "'token-mean'"),
    ("max_length", 7, ValueError, "loss_agg_mode='seq-mean-token-sum-norm' only"),
    ("return_entropy", "yes", TypeError, "a bool"),
]


@pytest.mark.parametrize(("name", "value", "error", "takes"), REFUSED)
def test_a_wrong_option_is_refused_by_name(name: str, value: Any, error: type[Exception], takes: str) -> None:
    with pytest.raises(error) as caught:
        LossOptions(**{name: value})
    assert type(caught.value) is error
    message = str(caught.value)
    assert name in message
    assert takes in message
    assert re.search(r"; got \S", message), f"{message!r} does not say what it got"


def test_every_option_has_a_value_that_is_refused() -> None:
    assert {name for name, *_ in REFUSED} == set(NAMES)


@pytest.mark.parametrize("value", [None, 0, -1.0, torch.tensor(5.0), "5"])
def test_the_norm_of_a_sum_needs_a_length(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_length must be .*> 0"):
        LossOptions(loss_agg_mode="seq-mean-token-sum-norm", max_length=value)
    LossOptions(loss_agg_mode="seq-mean-token-sum-norm", max_length=5)


def test_the_first_estimator_needs_the_ratio() -> None:
    with pytest.raises(ValueError, match="kl_estimator='k1' needs kl_importance_weighted=True.*got False"):
        LossOptions(kl_estimator="k1", kl_importance_weighted=False)


def test_values_of_tensors_are_not_looked_at() -> None:
    scalars = ("temperature", "eps_low", "eps_high", "dual_clip", "entropy_coef")
    LossOptions(**{name: torch.tensor(-1.0) for name in scalars})


def test_options_are_constant_and_compare_copy_and_pickle() -> None:
    options = LossOptions(cost_mode="split", eps_high=0.28, softcap=30.0, return_entropy=True)
    with pytest.raises(FrozenInstanceError):
        options.eps_high = 0.3  # type: ignore[misc]
    for other in (copy.copy(options), copy.deepcopy(options), pickle.loads(pickle.dumps(options)), replace(options)):
        assert other == options
        assert hash(other) == hash(options)
    assert eval(repr(options)) == options
    with pytest.raises(TypeError, match="positional"):
        LossOptions("split")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="eps_high"):
        replace(options, eps_high=-1.0)


FORMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything sampled": {
        "reference": "k3",
        "beta": 0.3,
        "lam": 1.0,
        "entropy_coef": 0.1,
        "softcap": 8.0,
        "importance_weights": True,
        "normalize": True,
        "dual_clip": 3.0,
        "temperature": 0.7,
    },
    "per token": {"loss_agg_mode": "none", "cost_form": "given", "reference": "k1", "beta": 0.2},
    "scalars on the device": {"eps_low": torch.tensor(0.1), "lam": torch.tensor(2.0)},
}


def parts(form: dict[str, Any]) -> tuple[Tensor, LossOptions, dict[str, Any]]:
    """The logits of a batch, and its arguments as options and inputs."""
    batch = make_batch(50, (3, 5), 11, dtype=torch.float32)
    arguments = loss_arguments(batch, **form)
    constant = {name: arguments.pop(name) for name in NAMES if name in arguments}
    return batch.logits, LossOptions(**constant), arguments


def tensors(out: RepoLossOutput) -> list[Tensor]:
    """The tensors of a result."""
    return [x for x in (out.loss, out.logps, out.entropy, out.kl, out.stats.tensor) if x is not None]


def same_bits(ours: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all tensors are equal, NaN to NaN."""
    pairs = zip(ours, others, strict=True)
    return all(a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_module_gives_the_bits_of_the_function(form: str, inplace: bool) -> None:
    logits, options, inputs = parts(FORMS[form])
    constant = {name: getattr(options, name) for name in NAMES}
    module = RepoLoss(options, inplace=inplace)
    assert isinstance(module, nn.Module)
    assert not list(module.parameters())
    results = []
    for call in (module, lambda x, **k: repo_loss(x, **constant, **k, inplace=inplace)):
        leaf = logits.clone().requires_grad_()
        out = call(leaf * 1, **inputs)
        out.loss.backward(torch.full_like(out.loss, 0.3))
        results.append([*tensors(out), leaf.grad])
    assert same_bits(*results)


@pytest.mark.parametrize("form", FORMS)
def test_the_linear_module_gives_the_bits_of_the_function(form: str) -> None:
    _, options, inputs = parts(FORMS[form])
    constant = {name: getattr(options, name) for name in NAMES}
    hidden, weight, bias = torch.randn(3, 5, 4), torch.randn(11, 4), torch.randn(11)
    results = []
    for call in (
        LinearRepoLoss(options, chunk_tokens=4, backend="eager"),
        lambda *head, **k: linear_repo_loss(*head, **constant, **k, chunk_tokens=4, backend="eager"),
    ):
        head = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        out = call(head[0], head[1], bias=head[2], **inputs)
        out.loss.backward(torch.full_like(out.loss, 0.3))
        results.append([*tensors(out), *(x.grad for x in head)])
    assert same_bits(*results)


@pytest.mark.parametrize("kind", [RepoLoss, LinearRepoLoss])
def test_a_module_without_options_has_the_defaults(kind: Callable[..., Any]) -> None:
    assert kind().options == LossOptions()
    assert "cost_mode='rectified'" in repr(kind())
    for wrong in ({"eps_low": 0.1}, 0.2):
        with pytest.raises(TypeError, match="options must be LossOptions or None; got"):
            kind(wrong)
    with pytest.raises(ValueError, match="backend must be one of"):
        kind(backend="banana")
    with pytest.raises(TypeError, match="group must be a torch.distributed process group or None; got str"):
        kind(group="tp")
    with pytest.raises(ValueError, match="chunk_tokens"):
        LinearRepoLoss(chunk_tokens=0)
    with pytest.raises(TypeError, match="inplace must be a bool"):
        RepoLoss(inplace="yes")  # type: ignore[arg-type]


def test_the_options_of_a_module_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, options, inputs = parts({})
    module, checked = RepoLoss(options), []
    monkeypatch.setattr(LossOptions, "__post_init__", lambda self: checked.append(self))
    monkeypatch.setattr(options_module, "check_choice", None)
    for _ in range(2):
        module(logits, **inputs)
    assert not checked


def test_a_module_still_checks_its_inputs_against_the_options() -> None:
    logits, _, inputs = parts({})
    for options, name in ((LossOptions(cost_mode="split"), "costs"), (LossOptions(loss_agg_mode="none"), "divisor")):
        wrong = {**inputs, "costs": None, "divisor": 3.0 if name == "divisor" else None}
        with pytest.raises(ValueError, match=name):
            RepoLoss(options)(logits, **wrong)
    with pytest.raises(ValueError, match="lam must be >= 0"):
        RepoLoss()(logits, **{**inputs, "lam": -1.0})


@pytest.mark.parametrize("form", FORMS)
def test_a_module_compiles_to_a_whole_graph(form: str) -> None:
    logits, options, inputs = parts(FORMS[form])
    module = RepoLoss(options, backend="eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled):
        leaf = logits.clone().requires_grad_()
        out = call(leaf * 1, **inputs)
        out.loss.backward(torch.full_like(out.loss, 0.3))
        results.append([*tensors(out), leaf.grad])
    for plain, whole in zip(*results, strict=True):
        assert torch.allclose(plain.nan_to_num(0.0), whole.nan_to_num(0.0), rtol=2e-6, atol=1e-7)


def test_a_linear_module_compiles_to_a_whole_graph() -> None:
    _, options, inputs = parts(FORMS["everything sampled"])
    module = LinearRepoLoss(options, backend="eager")
    hidden, weight = torch.randn(3, 5, 4), torch.randn(11, 4)
    torch._dynamo.reset()
    results = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        leaf = hidden.clone().requires_grad_()
        out = call(leaf * 1, weight, **inputs)
        out.loss.backward()
        results.append([out.loss.detach(), out.logps, leaf.grad])
    for plain, whole in zip(*results, strict=True):
        assert torch.allclose(plain, whole, rtol=2e-6, atol=1e-7)
