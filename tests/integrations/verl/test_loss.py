"""The policy loss beside verl's formulas of `vanilla` and `agg_loss`, written out. verl is not needed."""

from types import SimpleNamespace

import pytest
import torch

from repo_kernels.integrations.verl import policy_loss

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
COUNTS = {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 12, "loss_scale_factor": 7}


class Actor(SimpleNamespace):
    """Has the fields of verl's ActorConfig that the loss reads."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def actor(info=(), **fields):
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    return Actor(**defaults | fields, global_batch_info=dict(info))


def batch(dtype=torch.float64):
    """Return log-probabilities, advantages, mask and weights in the shapes that verl's ppo_loss passes, (B, R)."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 9, generator=generator, dtype=dtype) - 3
    new = (old + torch.randn(6, 9, generator=generator, dtype=dtype)).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 3, 1, 5, 0, 7])[:, None]
    advantages = (3 * torch.randn(6, 1, generator=generator, dtype=dtype)) * mask
    return old, new, advantages, mask, 2 * torch.rand(6, 9, generator=generator, dtype=dtype)


def vanilla(old, new, advantages, mask, mode, config, weights=None):
    """Return the loss of verl 0.9.1's compute_policy_loss_vanilla, token by token and sequence by sequence."""
    info = config.global_batch_info
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    sequences = []
    for row in range(len(old)):
        tokens = []
        for t in range(old.shape[1]):
            if not mask[row, t]:
                continue
            ratio, a = (new[row, t] - old[row, t]).clamp(-20, 20).exp(), advantages[row, t]
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
            if a < 0:
                loss = torch.minimum(loss, -a * config.clip_ratio_c)
            tokens.append(loss if weights is None else loss * weights[row, t])
        if tokens:
            sequences.append(torch.stack(tokens))
    processes = info.get("dp_size", 1)
    if mode == "token-mean":
        return torch.cat(sequences).sum() / info.get("batch_num_tokens", int(mask.sum())) * processes
    if mode == "token-sum":
        return torch.cat(sequences).sum() * processes
    of_each = [s.mean() if mode == "seq-mean-token-mean" else s.sum() for s in sequences]
    loss = sum(of_each) / info.get("global_batch_size", len(sequences)) * processes
    return loss / info.get("loss_scale_factor", old.shape[1]) if mode == "seq-mean-token-sum-norm" else loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, COUNTS], ids=["alone", "4 processes"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_are_those_of_vanilla(mode, info, weighted):
    old, new, advantages, mask, weights = batch()
    weights = weights if weighted else None
    config = actor(info)
    loss, _ = policy_loss(old, new, advantages, mask, mode, config, weights)
    expected = vanilla(old, new, advantages, mask, mode, config, weights)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-14)


def test_the_common_clip_ratio_serves_where_low_and_high_are_missing():
    old, new, advantages, mask, _ = batch()
    config = actor(clip_ratio=0.3, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=1.5)
    loss, _ = policy_loss(old, new, advantages, mask, "token-mean", config)
    torch.testing.assert_close(loss, vanilla(old, new, advantages, mask, "token-mean", config), rtol=1e-10, atol=0)
    assert loss != policy_loss(old, new, advantages, mask, "token-mean", actor())[0]


def test_metrics_have_verls_names_and_values():
    old, new, advantages, mask, _ = batch()
    _, metrics = policy_loss(old, new, advantages, mask, "token-mean", actor())
    ratio, live = (new - old).exp()[mask], (new - old)[mask]
    a = advantages[mask]
    clipped = ((a > 0) & (ratio > 1.28)) | ((a < 0) & (ratio < 0.8))
    assert metrics == pytest.approx(
        {"actor/pg_clipfrac": clipped.double().mean().item(), "actor/ppo_kl": -live.mean().item()}
    )


def test_what_lies_under_the_mask_is_not_read():
    old, new, advantages, mask, _ = batch(torch.float32)
    loss, _ = policy_loss(old, new, advantages, mask, "token-mean", actor())
    spoilt = (x.detach().masked_fill(~mask, torch.nan) for x in (old, new, advantages))
    assert policy_loss(*spoilt, mask.long(), "token-mean", actor())[0] == loss


def test_log_probabilities_in_half_precision_are_taken():
    old, new, advantages, mask, _ = batch(torch.float32)
    half = new.detach().bfloat16().requires_grad_()
    loss, _ = policy_loss(old.bfloat16(), half, advantages, mask, "token-mean", actor())
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("mode", "info", "message"),
    [
        ("token-median", {}, "loss_agg_mode must be one of token-mean, .*; got 'token-median'"),
        ("token-mean", {"dp_size": 2}, "global_batch_info needs batch_num_tokens with dp_size = 2; got None"),
        ("seq-mean-token-sum", {"dp_size": 2}, "global_batch_info needs global_batch_size with dp_size = 2; got None"),
    ],
)
def test_what_verl_refuses_is_refused_by_name(mode, info, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*batch()[:4], mode, actor(info))
