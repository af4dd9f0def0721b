"""Kinds of tensors that a call may be handed, and one example: a function, an argument, a kind, in place or not.

    echo '["repo_loss", "logits", "fake", true, "packed", "cpu", false]' | python -m tests.support.kernels.tensor_kinds

runs an example for each line that it reads, and answers with a line: what happened, or "failed: " and why.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "repo_loss": repo_loss,
    "linear_repo_loss": linear_repo_loss,
    "selective_log_softmax": selective_log_softmax,
    "linear_selective_log_softmax": linear_selective_log_softmax,
}
LAYOUTS = ("packed", "padded")
BACKENDS = ("cpu", "eager", None)
LEAVES = ("logits", "hidden", "weight", "bias")


class Wrapper(Tensor):
    """A tensor that has no memory of its own: it holds another one, on which every operator runs."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device,
            requires_grad=held.requires_grad,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.held if isinstance(value, Wrapper) else value

        def wrap(value: Any) -> Any:
            return Wrapper(value) if isinstance(value, Tensor) else value

        return tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))


class Stranger(Wrapper):
    """A wrapper that knows the operators of PyTorch alone."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} for Stranger")
        return super().__torch_dispatch__(func, types, args, kwargs)


class Named(Tensor):
    """A plain tensor with a __torch_function__ of its own."""


def held(value: Tensor) -> Tensor:
    """The tensor in a wrapper, any other one as it is."""
    return value.held if isinstance(value, Wrapper) else value


def negated(value: Tensor) -> Tensor:
    """The same values, negated lazily in memory; integers and masks as they are."""
    return torch._neg_view(-value) if value.is_floating_point() else value


def imaginary(value: Tensor) -> Tensor:
    """The same values, as the imaginary part of a conjugate."""
    if value.dtype not in (torch.float32, torch.float64):
        return value
    return torch.complex(torch.zeros_like(value), -value).conj().imag.contiguous()


def freed(value: Tensor) -> Tensor:
    """A tensor whose storage was freed."""
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def shrunk(value: Tensor) -> Tensor:
    """A tensor whose storage ends before its last element."""
    value = value.clone()
    value.untyped_storage().resize_(value.untyped_storage().nbytes() - value.itemsize)
    return value


def filled(value: Tensor) -> bool:
    """Whether an operator of PyTorch may read it."""
    if type(value) is not Tensor:
        return True
    return value.layout is torch.strided and value.untyped_storage().nbytes() >= value.numel() * value.itemsize


def distributed(value: Tensor) -> Tensor:
    """A DTensor over one process."""
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return DTensor.from_local(value, init_device_mesh("cpu", (1,)), [Replicate()])


def inference(value: Tensor) -> Tensor:
    """A copy made in inference mode."""
    with torch.inference_mode():
        return value.clone()


def jagged(value: Tensor) -> Tensor:
    """The rows as a nested tensor of jagged layout."""
    return torch.nested.nested_tensor(list(value.unbind()), layout=torch.jagged)


def nested(value: Tensor) -> Tensor:
    """The rows as a nested tensor of strided layout."""
    return torch.nested.nested_tensor(list(value.unbind()))


def masked(value: Tensor) -> Tensor:
    """A masked tensor in which nothing is masked."""
    return torch.masked.masked_tensor(value, torch.ones_like(value, dtype=torch.bool))


def unfilled(value: Tensor) -> Tensor:
    """A parameter that no call has given a shape."""
    return torch.nn.UninitializedParameter(dtype=value.dtype if value.is_floating_point() else torch.float32)


def fake(value: Tensor) -> Tensor:
    """A tensor with a shape alone."""
    return _mode().from_tensor(value)


_modes: list[FakeTensorMode] = []


def _mode() -> FakeTensorMode:
    if not _modes:
        _modes.append(FakeTensorMode())
    return _modes[0]


# The results are those of the plain tensor.
EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "parameter": lambda x: torch.nn.Parameter(x.clone(), requires_grad=x.is_floating_point()),
    "subclass": lambda x: x.as_subclass(Named),
    "wrapper": Wrapper,
    "negated": negated,
    "imaginary": imaginary,
    "inference": inference,
    "copy on write": lambda x: torch._lazy_clone(x),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
}
# An error names the argument, or only shapes come out, or the results are right nevertheless.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": fake,
    "meta": lambda x: x.to("meta"),
    "stranger": Stranger,
    "distributed": distributed,
    "freed": freed,
    "shrunk": shrunk,
    "lazy zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(),
    "jagged": jagged,
    "nested": nested,
    "masked": masked,
    "unfilled": unfilled,
    "module": lambda x: torch.nn.Linear(3, 2),
    "array": lambda x: x.numpy() if x.dtype != torch.bfloat16 else x.float().numpy(),
    "list": lambda x: x.tolist(),
}
KINDS = {**EQUAL, **OTHERS}


def arguments_of(function: str, layout: str) -> dict[str, Tensor]:
    """Every tensor argument that a function takes."""
    made = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    leading = (6,) if layout == "packed" else (2, 3)
    ids = torch.randint(0, 11, leading, generator=made)
    linear = function.startswith("linear")
    given: dict[str, Tensor] = {"hidden": normal(*leading, 4), "weight": normal(11, 4), "bias": normal(11)}
    given = given if linear else {"logits": normal(*leading, 11)}
    given |= {"token_ids": ids, "temperature": torch.tensor(0.8)}
    if function.endswith("log_softmax"):
        return given
    given |= {
        "old_logps": normal(*leading) - 2, "reward_advantages": normal(*leading), "cost_advantages": normal(2),
        "costs": normal(2), "cost_limit": normal(2), "importance_weights": normal(*leading).abs(),
        "response_mask": torch.rand(leading, generator=made) > 0.2, "lam": torch.tensor(0.7), "beta": torch.tensor(0.1),
        "divisor": torch.tensor(5.0), "eps_low": torch.tensor(0.2), "entropy_coef": torch.tensor(0.05),
        "grad_scale": torch.tensor(2.0), "dual_clip": torch.tensor(3.0),
    }  # fmt: skip
    if layout == "packed":
        given["cu_seqlens"] = torch.tensor([0, 2, 6], dtype=torch.int32)
    if linear:
        given |= {"ref_hidden": normal(*leading, 5), "ref_weight": normal(11, 5), "ref_bias": normal(11)}
    else:
        given["ref_logits"] = normal(*leading, 11)
    return given


def options_of(function: str, per_token: bool) -> dict[str, Any]:
    """The options of a call."""
    if function.endswith("log_softmax"):
        return {"return_entropy": True}
    return {"kl_estimator": "full", "loss_agg_mode": "none" if per_token else "seq-mean-token-mean"}


def results(function: str, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """What a call returns, and the gradients of what is differentiable in it."""
    given = dict(given)
    for name in LEAVES:
        value = given.get(name)
        if type(value) in (Tensor, Named, Wrapper) and not value.is_nested and not value.is_inference():
            given[name] = value.detach().requires_grad_() if not value._is_zerotensor() else value
    inputs = dict(given)
    logits = given.get("logits")
    if options.get("inplace") and type(logits) in (Tensor, Wrapper, Named) and logits.requires_grad and filled(logits):
        inputs["logits"] = logits * 1
    out = FUNCTIONS[function](**{**inputs, **options})
    if function.endswith("log_softmax"):
        values = dict(zip(("logps", "entropy"), out, strict=True))
        total = out[0].sum() - out[1].sum()
    else:
        values = {name: getattr(out, name) for name in ("loss", "logps", "kl", "entropy")}
        values["stats"], total = out.stats.tensor, out.loss.sum()
    if total.requires_grad:
        (total * 0.5).backward()
        values |= {f"gradient of {name}": given[name].grad for name in LEAVES if name in given}
    return {name: held(x.detach()) for name, x in values.items() if x is not None}


Example = tuple[str, str, str, bool, str, str | None, bool]


def examples() -> list[Example]:
    """Every example: function, argument, kind, in place, layout, backend, losses per token."""
    found: list[Example] = []
    for function, layout in itertools.product(FUNCTIONS, LAYOUTS):
        names = [*arguments_of(function, layout), "all"]
        places = (False, True) if function == "repo_loss" else (False,)
        losses = (False, True) if function.endswith("repo_loss") else (False,)
        found += itertools.product([function], names, KINDS, places, [layout], BACKENDS, losses)
    return found


def check(example: Example) -> str:
    """Run an example; return what it did, or raise AssertionError if it may not do that."""
    function, argument, kind, inplace, layout, backend, per_token = example
    given, options = arguments_of(function, layout), options_of(function, per_token)
    if per_token:
        del given["divisor"]
    options |= {"backend": backend}
    names = list(given) if argument == "all" else [argument]
    try:
        changed = {**given, **{name: KINDS[kind](given[name]) for name in names}}
        if kind == "parameter" and "temperature" in names:
            changed["temperature"].requires_grad_(False)  # it gets no gradient, and one that asks for it is refused
    except (KeyError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return "there is no such tensor"
    before = {name: x.clone() for name, x in given.items()}
    try:
        got = results(function, changed, options | ({"inplace": True} if inplace else {}))
    except (TypeError, ValueError) as error:
        message = str(error)
        assert any(name in message for name in (*given, "inplace", "backend")), f"names no argument: {message}"
        assert kind not in EQUAL or inplace, f"refused: {message}"
        return f"refused: {message}"
    assert all(torch.equal(before[name], x) for name, x in given.items()), "an argument was written to"
    if kind == "lazy zero":
        given |= {name: torch.zeros_like(given[name]) for name in names}
    expected, shapes = results(function, given, options), False
    for name, mine in got.items():
        other = expected[name]
        if isinstance(mine, FakeTensor) or mine.is_meta:
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype), name
            shapes = True
        else:  # a product of matrices may add up another stride in another order
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    return "shapes" if shapes else "equal"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        try:
            answer = check(tuple(json.loads(line)))
        except Exception:
            answer = f"failed: {traceback.format_exc()}"
        print(json.dumps(answer), flush=True)
