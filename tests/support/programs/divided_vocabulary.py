"""Four processes with gloo, in groups of 1 to 4, compare a head divided among them with a whole one.

python -m tests.support.programs.divided_vocabulary FOLDER: process 0 writes FOLDER/results.json, a list of cases with
the largest relative error of each quantity over the processes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from repo_kernels import LoraHead, linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from repo_kernels.losses.parallel.shard import VocabularyShard

WORLD, ROWS, WIDTH, VOCABULARY = 4, 13, 8, 24

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "KL, entropy, temperature": {"beta": 0.2, "entropy_coef": 0.1, "temperature": 0.7},
    "sequences": {"ratio_level": "sequence", "loss_agg_mode": "seq-mean-token-mean", "packed": True},
    "CISPO per token": {"surrogate": "cispo", "loss_agg_mode": "none"},
    "a frozen head": {"frozen": True},
    "a LoRA head": {"frozen": True, "adapted": True, "ratio_level": "sequence"},
    "one token of probability 0": {"impossible": True},
    "nothing live": {"dead": True},
    "a softcap": {"softcap": 1.5, "beta": 0.2, "entropy_coef": 0.1, "temperature": 0.7},
    "a softcap and sequences": {"softcap": 3.0, "ratio_level": "sequence", "packed": True, "temperatures": True},
    "a softcap and a LoRA head": {"softcap": 2.0, "frozen": True, "adapted": True, "surrogate": "cispo"},
    "a half of probability 0": {"masked": True, "entropy_coef": 0.1, "return_entropy": True},
}
TRITON = {
    2: ("a softcap", "a half of probability 0"),
    3: ("a softcap",),
}  # by size of the group: the interpreter is slow


def relative(got: Tensor, expected: Tensor) -> float:
    """The error beside the size of what is expected; NaN counts as infinitely wrong."""
    size = expected.double().norm().item()
    error = (got.double() - expected.double()).norm().item()
    return math.inf if math.isnan(error) else error / size if size else error


def case(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """Hidden states with NaN on a dead row, weight, bias, ids and the loss's other arguments."""
    torch.manual_seed(len(name))
    options = dict(OPTIONS[name])
    hidden, weight = torch.randn(ROWS, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    bias, ids = torch.randn(VOCABULARY, dtype=dtype), torch.randint(0, VOCABULARY, (ROWS,))
    ids[:3] = torch.tensor([0, VOCABULARY - 1, -100])
    hidden[2] = math.nan
    arguments = {
        "old_logps": torch.full((ROWS,), -3.0, dtype=dtype),
        "reward_advantages": torch.randn(ROWS, dtype=dtype),
    }
    if options.pop("impossible", False):
        bias[5] = -math.inf
    if options.pop("masked", False):  # all that one of 2 processes holds, or the last ones of 3 and of 4
        bias[VOCABULARY // 2 :] = -math.inf
        ids[1:2], ids[3:] = VOCABULARY // 2 - 1, ids[3:] % (VOCABULARY // 2)
    if options.pop("dead", False):
        ids[:] = -100
    if options.pop("temperatures", False):
        arguments["temperature"] = 0.5 + torch.rand(ROWS, dtype=dtype)
    if options.pop("packed", False):
        arguments["cu_seqlens"] = torch.tensor([0, 6, ROWS], dtype=torch.int32)
    if options.get("beta"):
        arguments["ref_logps"] = torch.full((ROWS,), -3.1, dtype=dtype)
    return hidden, weight, bias, ids, arguments | options


def compare(
    name: str, dtype: torch.dtype, backend: str, cut: Callable[[Tensor], Tensor], group: Any
) -> dict[str, float]:
    """Errors of one case in this process. cut: gives this process's part of a tensor (V, ...)."""
    hidden, weight, bias, ids, arguments = case(name, dtype)
    frozen, adapted = arguments.pop("frozen", False), arguments.pop("adapted", False)
    whole = [hidden.clone().requires_grad_(), *(x.clone().requires_grad_(not frozen) for x in (weight, bias))]
    part = [hidden.clone().requires_grad_(), *(cut(x).clone().requires_grad_(not frozen) for x in (weight, bias))]
    how: dict[str, Any] = {"backend": backend, "chunk_tokens": 4}
    a, b = torch.randn(2, WIDTH, dtype=dtype), torch.randn(VOCABULARY, 2, dtype=dtype)
    adapters = [(a.clone().requires_grad_(), x.clone().requires_grad_()) for x in (b, cut(b))]
    heads = [LoraHead(x[1], *lora, 0.7) if adapted else x[1] for x, lora in zip((whole, part), adapters, strict=True)]
    one = linear_repo_loss(whole[0], heads[0], ids, bias=whole[2], **arguments, **how)
    two = linear_repo_loss(part[0], heads[1], ids, bias=part[2], group=group, **arguments, **how)
    for out in (one, two):
        out.loss.sum().backward()
    errors = {"loss": relative(two.loss, one.loss), "statistics": relative(two.stats.tensor, one.stats.tensor)}
    errors["logps"] = relative(two.logps, one.logps)
    errors["dhidden"] = relative(part[0].grad, whole[0].grad)
    errors |= compare_logits(name, dtype, backend, cut, group)
    if adapted:
        (whole_a, whole_b), (part_a, part_b) = adapters
        errors |= {"dA": relative(part_a.grad, whole_a.grad), "dB": relative(part_b.grad, cut(whole_b.grad))}
    if not frozen:
        for key, got, expected in (("dweight", part[1].grad, whole[1].grad), ("dbias", part[2].grad, whole[2].grad)):
            errors[key] = relative(got, cut(expected))
    return errors


def compare_logits(
    name: str, dtype: torch.dtype, backend: str, cut: Callable[[Tensor], Tensor], group: Any
) -> dict[str, float]:
    """Errors of one case of the loss from logits, whose dead row is NaN."""
    hidden, weight, bias, ids, arguments = case(name, dtype)
    for option in ("frozen", "adapted"):
        arguments.pop(option, None)
    logits = hidden @ weight.t() + bias
    whole = logits.clone().requires_grad_()
    part = cut(logits.t()).t().clone().requires_grad_()
    one = repo_loss(whole, ids, **arguments, backend=backend)
    two = repo_loss(part, ids, **arguments, backend=backend, group=group)
    for out in (one, two):
        out.loss.sum().backward()
    expected = cut(whole.grad.t()).t()
    return {"loss of logits": relative(two.loss, one.loss), "dlogits": relative(part.grad, expected)}


def compare_dtensor(group: dist.ProcessGroup, rows: int) -> dict[str, float]:
    """Errors with a DTensor that is cut unevenly: log-probabilities, entropy and the gradient of the weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(rows, WIDTH)
    ids = torch.randint(0, rows, (ROWS,))
    mesh = DeviceMesh.from_group(group, "cpu")
    whole, divided = weight.clone().requires_grad_(), distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    one = linear_selective_log_softmax(hidden, whole, ids, return_entropy=True, softcap=2.0)
    two = linear_selective_log_softmax(hidden, divided, ids, return_entropy=True, softcap=2.0)
    for logps, entropy in (one, two):
        (logps.sum() + 0.5 * entropy.sum()).backward()
    errors = {"logps": relative(two[0], one[0]), "entropy": relative(two[1], one[1])}
    return errors | {"dweight": relative(divided.grad.full_tensor(), whole.grad)}


def compiled(group: dist.ProcessGroup, rank: int) -> dict[str, float]:
    """Errors of compiled calls beside eager ones, over values of temperature and lam, and the graphs compiled."""
    hidden, weight, bias, ids, arguments = case("plain", torch.float32)
    hidden = hidden.nan_to_num(0.0)
    arguments |= {"cost_advantages": arguments["reward_advantages"].flip(0), "entropy_coef": 0.1}
    logits = (hidden @ weight.t() + bias).chunk(2, dim=1)[rank]
    part = weight.chunk(2)[rank].contiguous()

    def step(x: Tensor, w: Tensor, z: Tensor, temperature: float, lam: float) -> Tensor:
        how: dict[str, Any] = {"temperature": temperature, "group": group}
        of_hidden = linear_repo_loss(x, w, ids, **arguments, **how, lam=lam, softcap=3.0)
        return of_hidden.loss + selective_log_softmax(z, ids, **how).mean()

    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(step, backend=counter, fullgraph=True)
    errors = {"loss": 0.0, "gradients": 0.0}
    for values in ((0.7, 1.0), (0.9, 0.5), (1.1, 0.0)):
        outcomes = []
        for call in (traced, step):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, part, logits)]
            loss = call(*leaves, *values)
            outcomes.append((loss.detach(), torch.autograd.grad(loss, leaves)))
        (got, grads), (expected, expected_grads) = outcomes
        errors["loss"] = max(errors["loss"], relative(got, expected))
        worst = max(map(relative, grads, expected_grads))
        errors["gradients"] = max(errors["gradients"], worst)
    return errors | {"graphs": counter.frame_count}


def refused(group: dist.ProcessGroup) -> dict[str, str]:
    """Messages for what a divided head does not take."""
    hidden, weight, _, ids, arguments = case("plain", torch.float32)
    logits, call = hidden @ weight.t(), arguments | {"token_ids": ids, "group": group}
    full = {"kl_estimator": "full", "ref_hidden": hidden, "ref_weight": weight}
    sets = {"kept": ids.clamp_min(0)[:, None]}
    calls: dict[str, Callable[[], Any]] = {
        "full": lambda: linear_repo_loss(hidden, weight, **call, **full),
        "full of logits": lambda: repo_loss(logits, **call, kl_estimator="full", ref_logits=logits),
        "kept": lambda: linear_repo_loss(hidden, weight, **call, **sets),
        "kept of logits": lambda: repo_loss(logits, **call, **sets),
        "inplace": lambda: repo_loss(logits, **call, inplace=True),
        "index": lambda: linear_repo_loss(hidden, weight, **call | {"token_ids": ids.masked_fill(ids == 0, 99)}),
        "group": lambda: linear_repo_loss(hidden, weight, **call | {"group": "data"}),
        "group of logits": lambda: selective_log_softmax(logits, ids, group="data"),
        "another's group": lambda: selective_log_softmax(logits, ids, group=dist.GroupMember.NON_GROUP_MEMBER),
        "transform": lambda: torch.func.grad(lambda x: linear_repo_loss(x, weight, **call).loss)(hidden),
        "transform of logits": lambda: torch.func.grad(lambda z: repo_loss(z, **call).loss)(logits),
        "second order": lambda: second_order(
            linear_selective_log_softmax(given := hidden.clone().requires_grad_(), weight, ids, group=group), given
        ),
        "second order of logits": lambda: second_order(
            selective_log_softmax(given := logits.clone().requires_grad_(), ids, group=group), given
        ),
    }
    return {name: message_of(call) for name, call in calls.items()}


def second_order(logps: Tensor, given: Tensor) -> None:
    """Ask for a gradient that can be differentiated again."""
    torch.autograd.grad(logps.sum(), given, create_graph=True)


def message_of(call: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        call()
    except Exception as error:  # the test reads what it says
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def too_few_rows(group: dist.ProcessGroup) -> str:
    """The message for a DTensor that leaves a process without a row."""
    divided = distribute_tensor(torch.randn(9, WIDTH), DeviceMesh.from_group(group, "cpu"), [Shard(0)])
    return message_of(lambda: linear_selective_log_softmax(torch.randn(2, WIDTH), divided, torch.tensor([0, 1])))


def unequal_rows(group: dist.ProcessGroup, rank: int) -> list[str]:
    """Messages for plain parts of unequal size, of hidden states and of logits."""
    hidden, weight, ids = torch.randn(2, WIDTH), torch.randn(3 if rank else 4, WIDTH), torch.tensor([0, 1])
    calls: list[Callable[[], Any]] = [
        lambda: linear_selective_log_softmax(hidden, weight, ids, group=group),
        lambda: selective_log_softmax(hidden @ weight.t(), ids, group=group),
    ]
    return [message_of(call) for call in calls]


def run(rank: int, folder: str) -> None:
    """Run all cases in process `rank`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, WORLD + 1)}
    results = []
    for size, group in groups.items():
        found: list[tuple[str, dict[str, float]]] = []
        if rank < size:
            for backend, dtype in (("eager", torch.float64), ("cpu", torch.float32), ("triton", torch.float32)):
                for name in OPTIONS if backend != "triton" else TRITON.get(size, ()):
                    errors = compare(name, dtype, backend, lambda x, n=size: x.chunk(n)[rank], group)
                    found.append((f"{size} processes, {backend}, {name}", errors))
            if size > 1:
                found.append((f"{size} processes, DTensor", compare_dtensor(group, 3 * size + 1)))
            if size == 2:
                found.append(("compiled", compiled(group, rank)))
        everything: list[Any] = [None] * WORLD
        dist.all_gather_object(everything, found)
        for i, (label, errors) in enumerate(everything[0]):
            worst = {key: max(one[i][1][key] for one in everything[:size]) for key in errors}
            results.append({"case": label, "errors": worst})
    beyond = VocabularyShard.equal(groups[WORLD], 6).local_ids(torch.tensor([24, -1, -100]))
    few, unequal = too_few_rows(groups[WORLD]), unequal_rows(groups[WORLD], rank)
    if rank == 0:
        told = {"cases": results, "refused": refused(groups[1]), "too few rows": few, "unequal": unequal}
        told["beyond"] = [x.tolist() for x in beyond]
        Path(folder, "results.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(run, (sys.argv[1],), nprocs=WORLD, start_method="fork")  # which imports everything once
