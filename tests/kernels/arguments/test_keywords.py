"""The keywords of the functions: one spelling, old names for one release, a suggestion for a wrong one."""

from __future__ import annotations

import inspect
import typing
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch

from repo_kernels import LinearRepoLoss, LossOptions, RepoLoss, keywords, linear_repo_loss, repo_loss
from repo_kernels.losses.inputs import LossInputs

LEADING, VOCABULARY = (2, 3), 5
OLD_NAMES = {
    "mode": ("cost_mode", "lagrangian", {"cost_advantages": torch.ones(2), "lam": 1.0}),
    "is_weights": ("importance_weights", torch.full(LEADING, 0.5), {}),
    "kl_ratio": ("kl_importance_weighted", False, {"ref_logps": torch.full(LEADING, -1.0), "beta": 1.0}),
}


def tail() -> dict[str, Any]:
    """The required arguments besides the logits."""
    ids = torch.zeros(LEADING, dtype=torch.int64)
    return {"token_ids": ids, "old_logps": torch.full(LEADING, -1.5), "reward_advantages": torch.ones(LEADING)}


def dense(**changed: Any) -> Any:
    """repo_loss of zeros."""
    return repo_loss(torch.zeros(*LEADING, VOCABULARY), **{**tail(), **changed})


def linear(**changed: Any) -> Any:
    """linear_repo_loss of zeros."""
    return linear_repo_loss(torch.zeros(*LEADING, 4), torch.zeros(VOCABULARY, 4), **{**tail(), **changed})


CALLS = pytest.mark.parametrize("call", [dense, linear])


@CALLS
@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_warns_at_the_call_and_gives_the_same_bits(call: Any, old: str) -> None:
    new, value, around = OLD_NAMES[old]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = call(**around, **{new: value})
    with pytest.warns(DeprecationWarning, match=f"'{old}' is now '{new}'") as caught:
        out = call(**around, **{old: value})
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.stats.tensor, expected.stats.tensor)


def test_an_old_name_warns_once_per_line() -> None:
    logits = torch.zeros(*LEADING, VOCABULARY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            repo_loss(logits, **tail(), kl_ratio=True)
        repo_loss(logits, **tail(), kl_ratio=True)
    assert len({warning.lineno for warning in caught}) == len(caught) == 2


@CALLS
@pytest.mark.parametrize("old", OLD_NAMES)
def test_both_names_at_once_are_refused(call: Any, old: str) -> None:
    new, value, around = OLD_NAMES[old]
    with pytest.raises(TypeError, match=f"got both '{new}' and its old name '{old}'"):
        call(**around, **{old: value, new: value})


def test_an_old_name_does_not_break_a_graph() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return repo_loss(logits, **tail(), mode="rectified", costs=torch.ones(2), lam=1.0).loss

    torch._dynamo.reset()
    logits = torch.randn(*LEADING, VOCABULARY)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
    assert torch.equal(whole, loss(logits))


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("cost_baseline", "cost_baselines"), ("temprature", "temperature"), ("old_logprobs", "old_logps")],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_one(wrong: str, near: str) -> None:
    for call, name in ((dense, "repo_loss"), (linear, "linear_repo_loss")):
        with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .*'{wrong}': did you mean '{near}'\?$"):
            call(**{wrong: 1.0})
    with pytest.raises(TypeError, match=rf"RepoLoss.forward\(\) got an unexpected .*'{wrong}'"):
        RepoLoss()(torch.zeros(*LEADING, VOCABULARY), **tail(), **{wrong: 1.0})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'qqq'$"):
        dense(qqq=1.0)


def test_options_are_not_inputs_of_a_module() -> None:
    for name, option in (("softcap", "softcap"), ("dual_clp", "dual_clip"), ("cost_mod", "cost_mode")):
        told = rf"'{name}': '{option}' is an option, which is given once, in LossOptions\({option}=\.\.\.\)$"
        with pytest.raises(TypeError, match=f"unexpected keyword argument {told}"):
            RepoLoss()(torch.zeros(*LEADING, VOCABULARY), **tail(), **{name: 1.0})
    with pytest.raises(TypeError, match="unexpected keyword argument 'mode'"):
        RepoLoss()(torch.zeros(*LEADING, VOCABULARY), **tail(), mode="split")


def test_missing_and_repeated_arguments_name_the_function() -> None:
    with pytest.raises(TypeError, match=r"^repo_loss\(\) missing 3 required positional arguments: 'token_ids'"):
        repo_loss(torch.zeros(*LEADING, VOCABULARY))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^RepoLoss\.forward\(\) missing 1 required positional argument: 'logits'"):
        RepoLoss()(**tail())
    with pytest.raises(TypeError, match=r"^linear_repo_loss\(\) got multiple values for argument 'hidden'"):
        linear_repo_loss(torch.zeros(1, 4), hidden=torch.zeros(1, 4))  # type: ignore[call-arg, misc]


POSITIONAL = ["token_ids", "old_logps", "reward_advantages", "cost_advantages"]


def test_signatures_list_every_keyword_in_the_documented_order() -> None:
    options = [field.name for field in fields(LossOptions)]
    inputs = [field.name for field in fields(LossInputs)]
    assert inputs[:4] == POSITIONAL
    head = ["hidden", "weight", *POSITIONAL, "bias", "ref_hidden", "ref_weight", "ref_bias"]
    expected = {
        repo_loss: ["logits", *POSITIONAL, "ref_logits", *inputs[4:], *options, "inplace", "backend", "group"],
        linear_repo_loss: [*head, *inputs[4:], *options, "chunk_tokens", "chunk_bytes", "backend", "group"],
        RepoLoss.forward: ["self", "logits", *POSITIONAL, "ref_logits", *inputs[4:], "temperature"],
        LinearRepoLoss.forward: ["self", *head, *inputs[4:], "temperature"],
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == names[: names.index("cost_advantages") + 1]
        required = [name for name, p in parameters.items() if p.default is p.empty and name != "self"]
        assert required == positional[positional.index("self") + 1 if "self" in positional else 0 : -1]


@pytest.mark.parametrize("function", [repo_loss, linear_repo_loss, RepoLoss.forward, LinearRepoLoss.forward])
def test_the_documentation_has_an_entry_for_every_argument(function: Any) -> None:
    doc = inspect.getdoc(function)
    listed = doc[doc.index("\nArgs:\n") : doc.index("\nReturns:\n")]
    entries = [line.strip().split(":")[0] for line in listed.splitlines() if line[:4] == "    " and line[4:5].isalpha()]
    documented = [name for entry in entries for name in entry.split(", ")]
    assert sorted(documented) == sorted(name for name in inspect.signature(function).parameters if name != "self")


def test_annotations_are_those_of_the_arguments() -> None:
    hints = inspect.signature(repo_loss).parameters
    assert hints["logits"].annotation == "Tensor"
    assert inspect.signature(repo_loss).return_annotation == "RepoLossOutput"
    assert "call" not in repo_loss.__annotations__
    assert typing.get_type_hints(LossOptions)["cost_mode"] is str


def test_a_function_of_a_dataclass_needs_no_documentation() -> None:
    """Docstrings are None under `python -OO`."""

    class Point:
        def __init__(self, x: float, y: float = 0.0) -> None:
            self.x, self.y = x, y

    @keywords.takes(Point)
    def size(point: Point) -> float:
        return abs(point.x) + abs(point.y)

    assert size.__doc__ is None
    assert size(1.0, y=-2.0) == 3.0
