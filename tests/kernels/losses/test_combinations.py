"""Combinations that would drop an option or miss an input are refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.arguments.test_arguments import LEADING, LOSSES, VOCABULARY, WIDTH, dense, linear, refuses

ONES = torch.ones(LEADING)
LOGITS = torch.zeros(*LEADING, VOCABULARY)
HEAD = {"ref_hidden": torch.zeros(*LEADING, WIDTH), "ref_weight": torch.zeros(VOCABULARY, WIDTH)}


@LOSSES
@pytest.mark.parametrize("beta", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_kl_weight_without_a_reference(call: Callable[..., Any], beta: Any) -> None:
    for estimator in ("k1", "k2", "k3"):
        refuses(ValueError, call, "beta", "none", "ref_logps", beta=beta, kl_estimator=estimator)
    full = "ref_logits" if call is dense else "ref_hidden"
    refuses(ValueError, call, "beta", "none", full, beta=beta, kl_estimator="full")


@LOSSES
def test_log_probs_of_a_reference_where_the_whole_distribution_is_taken(call: Callable[..., Any]) -> None:
    refuses(ValueError, call, "ref_logps", "'full'", "ref_", kl_estimator="full", ref_logps=ONES)
    both = {"ref_logits": LOGITS} if call is dense else HEAD
    refuses(ValueError, call, "ref_logps", "'full'", "ref_", kl_estimator="full", ref_logps=ONES, **both, beta=0.1)


@LOSSES
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_whole_reference_distribution_where_log_probs_are_taken(call: Callable[..., Any], estimator: str) -> None:
    full = {"ref_logits": LOGITS} if call is dense else HEAD
    for around in ({}, {"ref_logps": ONES}, {"ref_logps": ONES, "beta": 0.1}):
        refuses(ValueError, call, "ref_", repr(estimator), "ref_logps", kl_estimator=estimator, **full, **around)


@LOSSES
@pytest.mark.parametrize("beta", [0.1, torch.tensor(0.0)], ids=["float", "tensor"])
def test_k1_without_the_ratio(call: Callable[..., Any], beta: Any) -> None:
    wrong = {"kl_estimator": "k1", "kl_importance_weighted": False, "ref_logps": ONES}
    refuses(ValueError, call, "kl_estimator='k1'", "False", "kl_importance_weighted=True", **wrong, beta=beta)


def test_reference_logits() -> None:
    around = {"kl_estimator": "full", "beta": 0.1}
    refuses(TypeError, dense, "ref_logits", "int64", "float32", ref_logits=LOGITS.long(), **around)
    refuses(ValueError, dense, "ref_logits", "(2, 3, 4)", "(2, 3, 5)", ref_logits=LOGITS[..., :4], **around)
    refuses(ValueError, dense, "ref_logits", "meta", "cpu", ref_logits=LOGITS.to("meta"), **around)
    strided = torch.zeros(2, 5, 3).transpose(1, 2)
    refuses(ValueError, dense, "ref_logits", "strides", "unit stride", ref_logits=strided, **around)


def test_reference_head() -> None:
    def call(**changed: Any) -> Any:
        return linear(kl_estimator="full", beta=0.1, **{**HEAD, **changed})

    call()
    call(ref_hidden=torch.zeros(*LEADING, 2), ref_weight=torch.zeros(VOCABULARY, 2), ref_bias=torch.zeros(VOCABULARY))
    refuses(ValueError, call, "ref_weight", "None", "ref_hidden", ref_weight=None)
    refuses(ValueError, call, "ref_hidden", "None", "ref_weight", ref_hidden=None)
    refuses(ValueError, call, "ref_hidden", "(6, 4)", "(2, 3)", ref_hidden=torch.zeros(6, WIDTH))
    refuses(
        ValueError,
        call,
        "ref_hidden",
        "meta",
        "cpu",
        ref_hidden=HEAD["ref_hidden"].to("meta"),
        ref_weight=HEAD["ref_weight"].to("meta"),
    )
    refuses(ValueError, call, "ref_weight", "(5, 3)", "(V, 4)", ref_weight=torch.zeros(5, 3))
    refuses(ValueError, call, "ref_weight", "(6, 4)", "V = 5", ref_weight=torch.zeros(6, 4))
    refuses(TypeError, call, "ref_weight", "float64", "float32", ref_weight=HEAD["ref_weight"].double())
    refuses(ValueError, call, "ref_bias", "(4,)", "(5,)", ref_bias=torch.zeros(4))
    refuses(ValueError, linear, "ref_bias", "None", "ref_weight", ref_bias=torch.zeros(5))


@LOSSES
@pytest.mark.parametrize("mode", ["rectified", "lagrangian"])
def test_a_multiplier_without_a_cost(call: Callable[..., Any], mode: str) -> None:
    refuses(ValueError, call, "lam", "0.5", "cost_advantages", lam=0.5, cost_mode=mode)
    call(lam=0.0, cost_mode=mode)
    call(lam=0.5, cost_mode=mode, cost_advantages=ONES)


@LOSSES
def test_modes_that_form_no_hinge_take_no_cost_for_an_advantage(call: Callable[..., Any]) -> None:
    call(lam=0.5, costs=ONES)
    for mode in ("split", "lagrangian"):
        refuses(ValueError, call, "lam", "0.5", "cost_advantages", lam=0.5, cost_mode=mode, costs=ONES)


@LOSSES
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_split_without_costs_has_no_gate(call: Callable[..., Any], lam: float) -> None:
    refuses(ValueError, call, "costs", "None", "cost_mode='split'", cost_mode="split", cost_advantages=ONES, lam=lam)


@LOSSES
def test_baselines_that_nothing_would_subtract(call: Callable[..., Any]) -> None:
    call(cost_baselines=ONES, costs=ONES)
    refuses(ValueError, call, "cost_baselines", "costs=None", "costs", cost_baselines=ONES)
    given = {"cost_baselines": ONES, "costs": ONES, "cost_advantages": ONES}
    refuses(ValueError, call, "cost_baselines", "cost_advantages=given", "without cost_advantages", **given)
    for mode in ("split", "lagrangian"):
        refuses(ValueError, call, "cost_baselines", repr(mode), "rectified", cost_mode=mode, **given)


@LOSSES
@pytest.mark.parametrize("limit", [0.5, torch.tensor(0.5), torch.zeros(2)], ids=["float", "0-d", "per sequence"])
def test_a_cost_limit_without_costs_would_be_dropped(call: Callable[..., Any], limit: Any) -> None:
    refuses(ValueError, call, "cost_limit", "None", "costs", cost_limit=limit)


@LOSSES
@pytest.mark.parametrize("mode", ["token-sum", "none"])
def test_a_divisor_of_a_sum_that_is_not_divided(call: Callable[..., Any], mode: str) -> None:
    refuses(ValueError, call, "divisor", "8", repr(mode), divisor=8, loss_agg_mode=mode)


@LOSSES
def test_a_length_is_for_its_own_mode_and_required_there(call: Callable[..., Any]) -> None:
    refuses(ValueError, call, "max_length", "None", "> 0", loss_agg_mode="seq-mean-token-sum-norm")
    for wrong in (0, -4, float("nan")):
        refuses(
            ValueError,
            call,
            "max_length",
            repr(wrong),
            "> 0",
            loss_agg_mode="seq-mean-token-sum-norm",
            max_length=wrong,
        )
    for mode in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "none"):
        refuses(ValueError, call, "max_length", repr(mode), "seq-mean-token-sum-norm", loss_agg_mode=mode, max_length=8)


@LOSSES
@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_sequence_means_of_packed_rows_need_the_bounds(call: Callable[..., Any], mode: str) -> None:
    options = {"loss_agg_mode": mode, **({"max_length": 8} if mode.endswith("norm") else {})}
    call((6,), **options, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    refuses(ValueError, lambda **k: call((6,), **k), mode, "None", "cu_seqlens", **options)


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lam": (2.0, {"costs": ONES}),
    "costs": (ONES, {"lam": torch.tensor(1.0), "cost_advantages": None}),
    "cost_advantages": (ONES, {}),
    "cost_baselines": (ONES, {"lam": 1.0, "costs": ONES}),
    "cost_limit": (0.5, {"lam": 1.0, "costs": ONES}),
    "normalize": (True, {"lam": 1.0, "costs": 3 * ONES}),
    "importance_weights": (2 * ONES, {}),
    "temperature": (0.5, {}),
    "softcap": (2.0, {}),
    "eps_low": (0.9, {"old_logps": ONES * 0, "reward_advantages": -ONES}),
    "eps_high": (0.9, {"old_logps": -2.4 * ONES}),
    "dual_clip": (1.1, {"old_logps": -2.4 * ONES, "reward_advantages": -ONES}),
    "beta": (1.0, {"ref_logps": ONES}),
    "kl_importance_weighted": (False, {"ref_logps": ONES, "beta": 1.0, "old_logps": ONES}),
    "kl_estimator": ("k2", {"ref_logps": ONES, "beta": 1.0}),
    "entropy_coef": (0.5, {}),
    "divisor": (99.0, {}),
    "response_mask": (ONES.cumsum(-1) < 2, {}),
    "loss_agg_mode": ("token-sum", {}),
    "old_logps": (None, {}),
    "cost_mode": ("lagrangian", {"costs": ONES, "cost_advantages": ONES, "cost_limit": 2.0, "lam": 1.0}),
}


@LOSSES
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_loss(call: Callable[..., Any], name: str) -> None:
    value, around = OPTIONS[name]
    generator = torch.Generator().manual_seed(3)
    source = {
        "logits": torch.randn(*LEADING, VOCABULARY, generator=generator),
        "hidden": torch.randn(*LEADING, WIDTH, generator=generator),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=generator),
    }
    mine = {k: v for k, v in source.items() if (k == "logits") == (call is dense)}
    if name == "cost_mode":
        around = {**around, "cost_mode": "split"}
    if name in ("costs", "cost_advantages"):
        around = {**around, "lam": 1.0, ("cost_advantages" if name == "costs" else "costs"): 7 * ONES}
    without = call(**mine, **around).loss
    with_it = call(**mine, **{**around, name: value}).loss
    if name == "costs":
        # with advantages given, costs are for the statistics alone
        assert torch.equal(without, with_it)
        assert call(**mine, **{**around, name: value}).stats.sequences_unsafe == 2
    else:
        assert not torch.allclose(without, with_it, rtol=1e-4)
