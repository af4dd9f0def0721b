"""Every wrong argument is refused by name, with what came and what is taken; no option is dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax

pytestmark = pytest.mark.pairwise

LEADING, VOCABULARY, WIDTH = (2, 3), 5, 4


def tail(leading: tuple[int, ...] = LEADING) -> dict[str, Any]:
    """The least arguments besides the logits."""
    ids = torch.zeros(leading, dtype=torch.int64)
    return {"token_ids": ids, "old_logps": torch.zeros(leading), "reward_advantages": torch.ones(leading)}


def dense(leading: tuple[int, ...] = LEADING, **changed: Any) -> Any:
    """repo_loss of zeros with some arguments changed."""
    return repo_loss(**{"logits": torch.zeros(*leading, VOCABULARY), **tail(leading), **changed})


def linear(leading: tuple[int, ...] = LEADING, **changed: Any) -> Any:
    """linear_repo_loss of zeros with some arguments changed."""
    head = {"hidden": torch.zeros(*leading, WIDTH), "weight": torch.zeros(VOCABULARY, WIDTH)}
    return linear_repo_loss(**{**head, **tail(leading), **changed})


def dense_logps(leading: tuple[int, ...] = LEADING, **changed: Any) -> Any:
    """selective_log_softmax of zeros."""
    ids = torch.zeros(leading, dtype=torch.int64)
    return selective_log_softmax(**{"logits": torch.zeros(*leading, VOCABULARY), "token_ids": ids, **changed})


def linear_logps(leading: tuple[int, ...] = LEADING, **changed: Any) -> Any:
    """linear_selective_log_softmax of zeros."""
    head = {"hidden": torch.zeros(*leading, WIDTH), "weight": torch.zeros(VOCABULARY, WIDTH)}
    return linear_selective_log_softmax(**{**head, "token_ids": torch.zeros(leading, dtype=torch.int64), **changed})


LOSSES = pytest.mark.parametrize("call", [dense, linear])
LOGITS = pytest.mark.parametrize("call", [dense, dense_logps])
LINEAR = pytest.mark.parametrize("call", [linear, linear_logps])
ALL = pytest.mark.parametrize("call", [dense, linear, dense_logps, linear_logps])


def refuses(error: type[Exception], call: Callable[..., Any], name: str, got: str, takes: str, **changed: Any) -> None:
    """The call raises `error` whose message has the argument's name, what it got and what it takes, in any order."""
    with pytest.raises(error) as caught:
        call(**changed)
    message = str(caught.value)
    assert type(caught.value) is error
    for part in (name, got, takes):
        assert part in message, f"{part!r} is not in {message!r}"


@ALL
def test_the_untouched_call_is_accepted(call: Callable[..., Any]) -> None:
    assert call() is not None


@LOGITS
def test_logits(call: Callable[..., Any]) -> None:
    x = torch.zeros(*LEADING, VOCABULARY)
    refuses(TypeError, call, "logits", "list", "float32", logits=[[0.0]])
    refuses(TypeError, call, "logits", "int64", "bfloat16", logits=x.long())
    refuses(ValueError, call, "logits", "(5,)", "(T, V) or (B, L, V)", logits=x[0, 0])
    refuses(ValueError, call, "logits", "(1, 2, 3, 5)", "(T, V) or (B, L, V)", logits=x[None])
    refuses(ValueError, call, "logits", "(2, 3, 0)", "V >= 1", logits=x[..., :0])
    refuses(ValueError, call, "logits", "(15, 1, 3)", "unit stride", logits=x.view(2, 5, 3).transpose(1, 2))


@LINEAR
def test_hidden_weight_and_bias(call: Callable[..., Any]) -> None:
    hidden, weight = torch.zeros(*LEADING, WIDTH), torch.zeros(VOCABULARY, WIDTH)
    refuses(TypeError, call, "hidden", "int64", "float32", hidden=hidden.long())
    refuses(ValueError, call, "hidden", "(4,)", "(B, L,", hidden=hidden[0, 0])
    refuses(ValueError, call, "hidden", "strides", "unit stride", hidden=torch.zeros(2, 4, 3).transpose(1, 2))
    refuses(TypeError, call, "weight", "float64", "float32", weight=weight.double())
    refuses(TypeError, call, "weight", "NoneType", "float32", weight=None)
    refuses(ValueError, call, "weight", "(5, 3)", "(V, 4)", weight=weight[:, :3])
    refuses(ValueError, call, "weight", "(4, 5)", "pass its transpose", weight=weight.t())
    refuses(ValueError, call, "weight", "(5, 4, 1)", "4)", weight=weight[..., None])
    refuses(ValueError, call, "weight", "(0, 4)", "V >= 1", weight=weight[:0])
    refuses(ValueError, call, "weight", "meta", "cpu", weight=weight.to("meta"))
    refuses(TypeError, call, "bias", "float16", "float32", bias=torch.zeros(5).half())
    refuses(ValueError, call, "bias", "(4,)", "(5,)", bias=torch.zeros(4))
    refuses(ValueError, call, "bias", "meta", "cpu", bias=torch.zeros(5, device="meta"))


@LINEAR
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_chunk_tokens(call: Callable[..., Any], value: Any, error: type[Exception]) -> None:
    refuses(error, call, "chunk_tokens", str(value), "int >= 1 or None", chunk_tokens=value)


@ALL
def test_token_ids(call: Callable[..., Any]) -> None:
    ids = torch.zeros(LEADING, dtype=torch.int64)
    refuses(TypeError, call, "token_ids", "NoneType", "int64 or int32", token_ids=None)
    refuses(TypeError, call, "token_ids", "float32", "int64 or int32", token_ids=ids.float())
    refuses(TypeError, call, "token_ids", "uint8", "int64 or int32", token_ids=ids.to(torch.uint8))
    refuses(ValueError, call, "token_ids", "(3, 2)", "(2, 3)", token_ids=ids.T)
    refuses(ValueError, call, "token_ids", "(6,)", "(2, 3)", token_ids=ids.flatten())
    refuses(ValueError, call, "token_ids", "meta", "cpu", token_ids=ids.to("meta"))


@ALL
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [-1, -99, -101, VOCABULARY, 2**31 - 1])
def test_a_live_id_outside_the_vocabulary_is_an_index_error(call: Callable[..., Any], bad: int, dtype: Any) -> None:
    ids = torch.tensor([[0, 1, 2], [4, bad, 0]], dtype=dtype)
    refuses(IndexError, call, "token_ids", str(bad), "[0, 5) or -100", token_ids=ids)


@LOSSES
def test_a_dead_id_is_not_looked_at(call: Callable[..., Any]) -> None:
    ids = torch.tensor([[0, 1, 2], [4, 999, -7]])
    out = call(token_ids=ids, response_mask=(ids >= 0) & (ids < 5))
    assert out.stats.tokens == 4


PER_TOKEN = ("old_logps", "ref_logps", "importance_weights")
EITHER = ("reward_advantages", "cost_advantages", "costs", "cost_baselines", "cost_limit")


@LOSSES
@pytest.mark.parametrize("name", [*PER_TOKEN, *EITHER])
def test_values_per_token_and_per_sequence(call: Callable[..., Any], name: str) -> None:
    good = torch.zeros(LEADING)
    around = {"costs": torch.ones(2)} if name in ("cost_baselines", "cost_limit") else {}
    call(**{**around, name: good})
    refuses(TypeError, call, name, "bfloat16", "float32", **{**around, name: good.bfloat16()})
    refuses(TypeError, call, name, "int64", "float32", **{**around, name: good.long()})
    refuses(ValueError, call, name, "(3,)", "(2, 3)", **{**around, name: good[0]})
    refuses(ValueError, call, name, "(2, 3, 1)", "(2, 3)", **{**around, name: good[..., None]})
    refuses(ValueError, call, name, "meta", "cpu", **{**around, name: good.to("meta")})
    refuses(TypeError, call, name, "list", "float", **{**around, name: [0.0]})
    if name in EITHER:
        call(**{**around, name: torch.zeros(2)})
    else:
        refuses(ValueError, call, name, "(2,)", "(2, 3)", **{**around, name: torch.zeros(2)})


@LOSSES
def test_reward_advantages_are_required(call: Callable[..., Any]) -> None:
    refuses(TypeError, call, "reward_advantages", "None", "tensor", reward_advantages=None)


@LOSSES
def test_response_mask(call: Callable[..., Any]) -> None:
    mask = torch.ones(LEADING, dtype=torch.bool)
    refuses(ValueError, call, "response_mask", "2", "0 and 1", response_mask=mask.long() * 2)
    refuses(TypeError, call, "response_mask", "complex64", "bool", response_mask=mask.to(torch.complex64))
    refuses(ValueError, call, "response_mask", "(2,)", "(2, 3)", response_mask=mask[:, 0])
    refuses(ValueError, call, "response_mask", "meta", "cpu", response_mask=mask.to("meta"))


@LOSSES
def test_cu_seqlens(call: Callable[..., Any]) -> None:
    def packed(**changed: Any) -> Any:
        return call((6,), **changed)

    def bounds(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    packed(cu_seqlens=bounds(0, 2, 2, 6))
    refuses(ValueError, call, "cu_seqlens", "(2, 3)", "packed", cu_seqlens=bounds(0, 6))
    refuses(TypeError, packed, "cu_seqlens", "int64", "int32", cu_seqlens=bounds(0, 6).long())
    refuses(TypeError, packed, "cu_seqlens", "list", "int32", cu_seqlens=[0, 6])
    refuses(ValueError, packed, "cu_seqlens", "(1, 2)", "(B+1,)", cu_seqlens=bounds(0, 6)[None])
    refuses(ValueError, packed, "cu_seqlens", "(0,)", "(B+1,)", cu_seqlens=bounds())
    refuses(ValueError, packed, "cu_seqlens", "meta", "cpu", cu_seqlens=bounds(0, 6).to("meta"))
    for wrong in ((-1, 6), (0, 7), (0, 4, 3, 6), (7,)):
        refuses(ValueError, packed, "cu_seqlens", str(list(wrong)), "within 0 and T = 6", cu_seqlens=bounds(*wrong))


@LOSSES
def test_a_wrong_last_bound_is_shown_however_many_there_are(call: Callable[..., Any]) -> None:
    bounds = torch.tensor([0] * 20 + [77], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens .* T = 6.*77"):
        call((6,), cu_seqlens=bounds)


@LOSSES
@pytest.mark.parametrize("name", ["reward_advantages", "cost_advantages", "costs"])
def test_packed_values_per_sequence_need_the_bounds(call: Callable[..., Any], name: str) -> None:
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    call((6,), **{name: torch.ones(2)}, cu_seqlens=bounds)
    refuses(ValueError, lambda **k: call((6,), **k), name, "(2,)", "(6,)", **{name: torch.ones(2)})
    refuses(ValueError, lambda **k: call((6,), **k), name, "(3,)", "(2,)", **{name: torch.ones(3)}, cu_seqlens=bounds)


RANGES = {
    "lam": (-0.1, ">= 0"),
    "beta": (-0.1, ">= 0"),
    "eps_low": (-0.1, ">= 0"),
    "eps_high": (-0.1, ">= 0"),
    "dual_clip": (1.0, "> 1"),
    "grad_scale": (0.0, "> 0"),
    "temperature": (0.0, "> 0"),
    "softcap": (-30.0, "> 0"),
    "divisor": (0.0, "> 0"),
    "entropy_coef": (float("inf"), "finite"),
    "cost_limit": (float("inf"), "finite"),
}
NEEDS = {
    "lam": {"costs": torch.ones(2)},
    "beta": {"ref_logps": torch.zeros(LEADING)},
    "cost_limit": {"costs": torch.ones(2)},
}


@LOSSES
@pytest.mark.parametrize("name", RANGES)
def test_scalars_out_of_range_or_of_another_type(call: Callable[..., Any], name: str) -> None:
    value, takes = RANGES[name]
    around = NEEDS.get(name, {})
    call(**around, **{name: 1.5 if name != "eps_low" else 0.5})
    refuses(ValueError, call, name, repr(value), takes, **around, **{name: value})
    refuses(ValueError, call, name, "nan", takes, **around, **{name: float("nan")})
    for beyond in (1e39, 1e-39):  # infinite and 0 in the kernels' fp32
        refuses(ValueError, call, name, repr(beyond), "float32", **around, **{name: beyond})
    refuses(TypeError, call, name, "str", "float", **around, **{name: "1"})
    refuses(TypeError, call, name, "bool", "float", **around, **{name: True})
    if name not in ("cost_limit", "softcap", "temperature"):  # which take one value for each of two sequences
        refuses(ValueError, call, name, "(2,)", "0-d", **around, **{name: torch.ones(2)})
    if name != "softcap":
        call(**around, **{name: torch.tensor(1.5)})
    else:
        refuses(TypeError, call, name, "float32", "float", softcap=torch.tensor(30.0))


@LOSSES
def test_scalars_on_a_device_without_data_are_refused(call: Callable[..., Any]) -> None:
    for name in RANGES.keys() - {"softcap"}:
        meta = {name: torch.ones((), device="meta")}
        refuses(ValueError, call, name, "meta", "with data", **NEEDS.get(name, {}), **meta)


@LOSSES
def test_a_lower_clip_wider_than_one_is_refused(call: Callable[..., Any]) -> None:
    refuses(ValueError, call, "eps_low", "1.01", "[0, 1]", eps_low=1.01)


@pytest.mark.parametrize("call", [dense_logps, linear_logps])
def test_options_of_the_log_probabilities(call: Callable[..., Any]) -> None:
    refuses(ValueError, call, "temperature", "-1.0", "> 0", temperature=-1.0)
    refuses(TypeError, call, "temperature", "None", "float", temperature=None)
    refuses(ValueError, call, "softcap", "0", "> 0", softcap=0)
    refuses(TypeError, call, "return_entropy", "1", "bool", return_entropy=1)


@LOSSES
@pytest.mark.parametrize("name", ["normalize", "kl_importance_weighted", "return_entropy"])
def test_switches_are_bools(call: Callable[..., Any], name: str) -> None:
    refuses(TypeError, call, name, "1", "bool", **{name: 1})
    refuses(TypeError, call, name, "None", "bool", **{name: None})


def test_inplace_is_a_bool() -> None:
    refuses(TypeError, dense, "inplace", "'yes'", "bool", inplace="yes")


@LOSSES
@pytest.mark.parametrize(
    ("name", "choice"),
    [("cost_mode", "rectified"), ("kl_estimator", "k3"), ("loss_agg_mode", "token-mean"), ("backend", "eager")],
)
def test_choices_name_those_that_exist(call: Callable[..., Any], name: str, choice: str) -> None:
    refuses(ValueError, call, name, "'banana'", repr(choice), **{name: "banana"})


@pytest.mark.parametrize("call", [dense_logps, linear_logps])
def test_the_backend_of_the_log_probabilities(call: Callable[..., Any]) -> None:
    refuses(ValueError, call, "backend", "'banana'", "'eager'", backend="banana")
