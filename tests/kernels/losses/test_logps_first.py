"""GSPO's ratio of a sequence and CISPO's surrogate: every form and backend against a loss written out per token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from repo_kernels import LossOptions, RepoLoss, linear_repo_loss, repo_loss, repo_loss_from_logps
from tests.support.kernels.cases import make_batch
from tests.support.kernels.option_sets import LOGPS_FIRST, make_call

EPS_LOW, EPS_HIGH = 0.2, 0.3
PAIRS = [("clip", "sequence"), ("cispo", "token"), ("cispo", "sequence")]


def written_out(logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, surrogate: str, level: str) -> Tensor:
    """The token mean of the loss, sequence by sequence and token by token. logps, old, mask: (B, L)."""
    total, count = logps.new_zeros(()), 0
    for row in range(len(logps)):
        tokens = [t for t in range(logps.shape[1]) if mask[row, t]]
        logs = [logps[row, t] - old[row, t] for t in tokens]
        for t, log in zip(tokens, logs, strict=True):
            ratio = torch.exp(sum(logs) / len(logs) if level == "sequence" else log)
            kept = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
            if surrogate == "cispo":
                total = total - kept.detach() * advantages[row] * logps[row, t]
            else:
                total = total - torch.minimum(ratio * advantages[row], kept * advantages[row])
            count += 1
    return total / max(count, 1)


def case(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    batch = make_batch(3, vocabulary=17, leading=(4, 6), dtype=dtype)
    options = {"eps_low": EPS_LOW, "eps_high": EPS_HIGH, "response_mask": batch.response_mask}
    old = batch.old_logps + torch.linspace(-0.8, 0.8, 4, dtype=batch.old_logps.dtype)[:, None]  # ratios on all sides
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=old.dtype)
    return batch.logits, {"token_ids": batch.token_ids, "old_logps": old, "reward_advantages": advantages, **options}


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
def test_logits_and_hidden_states_give_the_loss_written_out(backend: str, surrogate: str, level: str) -> None:
    logits, arguments = case(torch.float32)
    live = arguments["response_mask"] & (arguments["token_ids"] != -100)
    exact = torch.where(live[..., None], logits, 0.0).double().requires_grad_()
    ids = torch.where(live, arguments["token_ids"], 0)
    logps = torch.log_softmax(exact, -1).gather(-1, ids[..., None])[..., 0]
    old, advantages = arguments["old_logps"].double(), arguments["reward_advantages"].double()
    expected = written_out(logps, old, advantages, live, surrogate, level)
    expected.backward()
    options: dict[str, Any] = {"surrogate": surrogate, "ratio_level": level, "backend": backend}
    for form in ("logits", "hidden"):
        given = logits.clone().requires_grad_()
        if form == "logits":
            out = repo_loss(given, **arguments, **options)
        else:
            out = linear_repo_loss(given, torch.eye(17), **arguments, **options, chunk_tokens=5)
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
        assert not given.grad[~live].any()


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
def test_temperature_softcap_and_the_scale_of_the_gradient_reach_both_passes(form, surrogate, level) -> None:
    logits, arguments = case(torch.float64)
    live = arguments["response_mask"] & (arguments["token_ids"] != -100)
    exact = torch.where(live[..., None], logits, 0.0).requires_grad_()
    ids = torch.where(live, arguments["token_ids"], 0)
    logps = torch.log_softmax(3.0 * torch.tanh(exact / 3.0) / 0.6, -1).gather(-1, ids[..., None])[..., 0]
    expected = written_out(logps, arguments["old_logps"], arguments["reward_advantages"], live, surrogate, level)
    expected.backward()
    given, options = logits.clone().requires_grad_(), {"temperature": 0.6, "softcap": 3.0, "grad_scale": 4.0}
    head = () if form == "logits" else (torch.eye(17, dtype=torch.float64),)
    call = repo_loss if form == "logits" else linear_repo_loss
    out = call(given, *head, **arguments, **options, surrogate=surrogate, ratio_level=level)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.detach())
    torch.testing.assert_close(given.grad, (4.0 if form == "logits" else 1.0) * exact.grad)  # a head divides it out


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("surrogate", "clipped"), [("clip", 1), ("cispo", 2)])
def test_cispo_clips_the_ratio_whatever_the_advantage(surrogate: str, clipped: int, level: str) -> None:
    old, advantages = torch.tensor([-1.0, -1.0, -3.0, -3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    how = {"surrogate": surrogate, "ratio_level": level}  # of ratios e^-1, e^-1, e, e
    out = repo_loss_from_logps(torch.full((4,), -2.0), old, advantages, **how)
    assert (out.stats.clipped_low_safe, out.stats.clipped_high_safe) == (clipped, clipped)


def test_the_ratio_of_a_sequence_is_one_number_and_is_what_the_statistics_are_of() -> None:
    logits, arguments = case(torch.float64)
    out = repo_loss(logits, **arguments, ratio_level="sequence")
    live = arguments["response_mask"] & (arguments["token_ids"] != -100)
    means = [(out.logps - arguments["old_logps"])[row][live[row]].mean().exp() for row in range(4) if live[row].any()]
    torch.testing.assert_close(out.stats.ratio_max, torch.stack(means).max())
    torch.testing.assert_close(out.stats.ratio_min, torch.stack(means).min())


def test_a_packed_batch_is_the_padded_one() -> None:
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, 0.0]], dtype=torch.float64)
    old, mask = logps + torch.tensor([[0.3], [-0.6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages = torch.tensor([1.0, -2.0], dtype=torch.float64)
    padded = logps.clone().requires_grad_()
    packed = logps.flatten()[:5].clone().requires_grad_()
    one = repo_loss_from_logps(padded, old, advantages, response_mask=mask, ratio_level="sequence")
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    two = repo_loss_from_logps(packed, old.flatten()[:5], advantages, cu_seqlens=bounds, ratio_level="sequence")
    one.loss.backward()
    two.loss.backward()
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(padded.grad.flatten()[:5], packed.grad)


def test_of_sequences_of_one_token_both_levels_are_the_same() -> None:
    logits, arguments = make_call("tokens", "plain", torch.float64)
    losses = [repo_loss(logits, **arguments, ratio_level=level).loss for level in ("token", "sequence")]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_a_clipped_token_keeps_its_gradient_under_cispo_and_loses_it_under_the_clip() -> None:
    old, advantages = torch.tensor([-2.0]), torch.tensor([1.0])
    for surrogate, expected in (("clip", 0.0), ("cispo", -1.2)):
        logps = torch.tensor([-1.0], requires_grad=True)
        out = repo_loss_from_logps(logps, old, advantages, surrogate=surrogate)
        out.loss.backward()
        assert logps.grad.item() == pytest.approx(expected)
        assert out.stats.clip_fraction == 1


@pytest.mark.parametrize(("surrogate", "level"), PAIRS)
def test_tokens_of_probability_zero_dead_rows_and_empty_batches_give_finite_gradients(surrogate, level) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = -math.inf
    logits[1] = math.nan
    ids = torch.tensor([[1, 2, 3], [0, 0, 0]])
    old = torch.tensor([[-math.inf, -1.0, -1.5], [0.0, 0.0, 0.0]])
    for mask in (torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.zeros(2, 3)):
        given = logits.clone().requires_grad_()
        how = {"surrogate": surrogate, "ratio_level": level}
        out = repo_loss(given, ids, old, torch.ones(2), response_mask=mask, **how)
        out.loss.backward()
        assert out.loss.isfinite()
        assert given.grad.isfinite().all()
        assert not given.grad[1].any()
    assert out.loss == 0


@pytest.mark.parametrize("options", LOGPS_FIRST)
def test_it_compiles_to_one_graph_and_not_again_for_other_values(options: str) -> None:
    logits, arguments = make_call("padded", options)
    logits = torch.where(logits.isnan(), 0.0, logits)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    def loss(z: Tensor, lam: Tensor) -> Tensor:
        return repo_loss(z, **arguments | {"lam": lam}).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for scale, lam in ((1.0, 1.0), (0.5, 2.0), (0.25, 3.0)):
        expected = loss(scale * logits, torch.tensor(lam))
        torch.testing.assert_close(compiled(scale * logits, torch.tensor(lam)), expected)
    assert counter.frame_count == 1


def test_the_module_takes_the_options() -> None:
    logits, arguments = case(torch.float32)
    options = {name: arguments.pop(name) for name in ("eps_low", "eps_high")}
    module = RepoLoss(LossOptions(surrogate="cispo", ratio_level="sequence", **options))
    direct = repo_loss(logits, **arguments, **options, surrogate="cispo", ratio_level="sequence")
    assert module(logits, **arguments).loss == direct.loss


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        (r"^surrogate must be .*'clip'.*'cispo'.*; got 'ppo'", {"surrogate": "ppo"}),
        (r"^ratio_level must be .*got 'word'", {"ratio_level": "word"}),
        (r"^dual_clip is for surrogate='clip'; got", {"surrogate": "cispo", "dual_clip": 3.0}),
        (r"^kl_estimator='full' is for surrogate='clip' and ratio_level='token'; got", {
            "ratio_level": "sequence", "kl_estimator": "full", "ref_logits": torch.zeros(3, 4)}),
        (r"^inplace=True is for surrogate='clip', ratio_level='token'", {"surrogate": "cispo", "inplace": True}),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(match: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        repo_loss(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.ones(3), **changed)
