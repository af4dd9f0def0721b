"""The loss from log-probabilities is repo_loss through a log-softmax, term by term."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import repo_loss, repo_loss_from_logps, selective_log_softmax
from tests.support.kernels.option_sets import CALLS as ALL_CALLS
from tests.support.kernels.option_sets import LOGPS_FIRST, OPTIONS, make_call

BF16 = torch.zeros(3, dtype=torch.bfloat16)
VOCABULARY_OPTIONS = {"temperature", "softcap", "entropy_coef", "return_entropy", "grad_scale", "token_ids"}
TAKEN = [name for name in OPTIONS if "full KL" not in name]
CALLS = [(layout, options) for layout, options in ALL_CALLS if options in TAKEN]
CALLS += [(layout, options) for layout in ("padded", "packed") for options in LOGPS_FIRST]
SEQUENCE_RATIO = "sequence ratio, k3, entropy"


def paired_call(layout: str, options: str) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """fp64 logits, the arguments of repo_loss without those of the vocabulary, and the same for log-probabilities."""
    logits, arguments = make_call(layout, options, torch.float64)
    arguments = {name: x for name, x in arguments.items() if name == "token_ids" or name not in VOCABULARY_OPTIONS}
    ids = arguments["token_ids"]
    mask = ids != -100 if arguments["response_mask"] is None else arguments["response_mask"] & (ids != -100)
    given = {name: x for name, x in arguments.items() if name != "token_ids"} | {"response_mask": mask}
    return logits, arguments, given


def log_probs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return selective_log_softmax(logits, torch.where(mask, ids, -100))


@pytest.mark.parametrize(("layout", "options"), CALLS)
def test_it_is_the_loss_of_logits_through_a_log_softmax(layout: str, options: str) -> None:
    logits, arguments, given = paired_call(layout, options)
    fused, composed = (logits.clone().requires_grad_() for _ in range(2))
    expected = repo_loss(fused, **arguments)
    expected.loss.sum().backward()
    logps = log_probs(composed, arguments["token_ids"], given["response_mask"])
    # dead rows are not read
    out = repo_loss_from_logps(torch.where(given["response_mask"], logps, torch.nan), **given)
    out.loss.sum().backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.stats.tensor, expected.stats.tensor, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.logps, expected.logps, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(composed.grad, fused.grad, rtol=1e-9, atol=1e-12)
    assert (out.kl is None) == (expected.kl is None)
    assert out.entropy is None


@pytest.mark.parametrize(
    "options", [*(name for name in TAKEN if name != "on-policy, no costs, no mask"), SEQUENCE_RATIO]
)
def test_its_derivatives_pass_gradcheck_twice(options: str) -> None:
    logits, arguments, given = paired_call("packed", options)
    logps = log_probs(logits, arguments["token_ids"], given["response_mask"])
    logps = logps.detach().requires_grad_()

    def f(x: Tensor) -> Tensor:
        return repo_loss_from_logps(x, **given).loss

    assert torch.autograd.gradcheck(f, (logps,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (logps,))


def test_on_policy_the_ratio_is_one_and_has_a_gradient() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    out = repo_loss_from_logps(logps, None, torch.tensor([3.0, -1.0]))
    out.loss.backward()
    assert out.loss.item() == -1.0
    assert logps.grad.tolist() == [-1.5, 0.5]


def test_equal_log_probs_have_the_gradient_of_the_ratio() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    repo_loss_from_logps(logps, logps.detach(), torch.tensor([3.0, -1.0])).loss.backward()
    assert logps.grad.tolist() == [-1.5, 0.5]


def test_far_from_the_reference_the_gradient_is_that_of_the_clamp() -> None:
    logits = torch.tensor([[0.0, 40.0]], dtype=torch.float64, requires_grad=True)
    ids, old, ref, zero = torch.tensor([0]), torch.tensor([-40.0]), torch.tensor([0.0]), torch.zeros(1)
    options: dict[str, Any] = {"ref_logps": ref.double(), "beta": 1.0}
    (expected,) = torch.autograd.grad(repo_loss(logits, ids, old.double(), zero.double(), **options).loss, logits)
    logps = torch.log_softmax(logits, -1)[:, 0]
    (got,) = torch.autograd.grad(repo_loss_from_logps(logps, old.double(), zero.double(), **options).loss, logits)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    assert expected[0, 0] < -1


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, r"^logps must be a tensor of float32 or float64; got bfloat16", {"logps": BF16}),
        (ValueError, r"^logps must have shape \(T,\) or \(B, L\); got .*\(1, 1, 3\)", {"logps": torch.zeros(1, 1, 3)}),
        (ValueError, r"^kl_estimator='full' needs the logits", {"kl_estimator": "full"}),
        (ValueError, r"^old_logps must have shape \(3,\)", {"old_logps": torch.zeros(4)}),
        (ValueError, r"^beta > 0 .* needs ref_logps", {"beta": 0.5}),
        (ValueError, r"^loss_agg_mode='seq-.* needs cu_se", {"loss_agg_mode": "seq-mean-token-sum"}),
        (TypeError, r"unexpected keyword argument 'temperature'", {"temperature": 0.5}),
        (TypeError, r"unexpected keyword argument 'token_ids'", {"token_ids": torch.zeros(3)}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(error: type[Exception], match: str, changed: dict[str, Any]) -> None:
    given = {"logps": torch.zeros(3), "old_logps": torch.zeros(3), "reward_advantages": torch.ones(3), **changed}
    with pytest.raises(error, match=match):
        repo_loss_from_logps(**given)


def test_its_arguments_are_those_of_repo_loss_without_the_vocabulary() -> None:
    mine, other = (set(inspect.signature(f).parameters) for f in (repo_loss_from_logps, repo_loss))
    assert mine - other == {"logps"}
    assert other - mine == VOCABULARY_OPTIONS | {"logits", "ref_logits", "inplace", "backend", "group", "kept"}


def test_it_compiles_to_one_graph() -> None:
    _, _, given = paired_call("padded", "k3, entropy, importance weights, dual clip")
    logps = torch.linspace(-3, -1, 15, dtype=torch.float64).reshape(3, 5).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: repo_loss_from_logps(x, **given).loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logps), repo_loss_from_logps(logps, **given).loss)
