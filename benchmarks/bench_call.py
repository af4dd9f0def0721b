"""What does a small call of the loss cost, where the host's work and not the kernel decides?

    pytest benchmarks/bench_call.py                 # table; --quick, --save, --compare OLD.json

Logits of 64 x 256 in fp32, one thread, forward and backward, CALLS calls a round. PyTorch's loss is a dozen lines as
training scripts write them. Predicted from one call of each part: 45 us for an autograd.Function with its backward, 25
for checking 37 arguments, 15 for 5 allocations and their views, 20 for two calls of the extension with 16 k logits: 105
us, where PyTorch takes 4 to 6 us for each of its 30 to 45 operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.machine import device
from benchmarks.harness.results import OURS
from repo_kernels import repo_loss

CALLS = 50
SEQUENCES, LENGTH, VOCABULARY = 4, 16, 256
BETA, LAM = 0.1, 0.5
SMALL: dict[str, Any] = {}

Inputs = dict[str, Tensor]


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the plain surrogate, and one with what a constrained run adds."""
    return {"surrogate": {"constrained": False}, "costs, KL, mask, sequence means": {"constrained": True}}


def make_inputs() -> Inputs:
    """Draw the inputs of SEQUENCES sequences of LENGTH tokens."""
    draw = torch.Generator().manual_seed(0)
    shape = SEQUENCES, LENGTH
    logits = torch.randn(*shape, VOCABULARY, generator=draw)
    ids = torch.randint(0, VOCABULARY, shape, generator=draw)
    logps = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    near = torch.tensor([-0.4, -0.1, 0.1, 0.4])  # no ratio so near the clip that rounding decides
    old, ref = (logps + near[torch.randint(0, 4, shape, generator=draw)] for _ in range(2))
    rewards, costs = torch.randn(SEQUENCES, generator=draw), torch.randn(SEQUENCES, generator=draw)
    mask = torch.rand(shape, generator=draw) > 0.2
    inputs = {"logits": logits, "ids": ids, "old": old, "ref": ref, "rewards": rewards, "costs": costs, "mask": mask}
    return {name: value.to(device()) for name, value in inputs.items()}


def plain(p: Inputs, constrained: bool) -> Tensor:
    """Compute the loss in PyTorch."""
    logps = torch.log_softmax(p["logits"], -1).gather(-1, p["ids"][..., None]).squeeze(-1)
    advantages = p["rewards"]
    if constrained:
        advantages = advantages - LAM * p["costs"].clamp_min(0)
    ratio = (logps - p["old"]).exp()
    surrogate = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    if not constrained:
        return surrogate.mean()
    delta = p["ref"] - logps
    loss = surrogate + BETA * ratio * (delta.exp() - delta - 1)
    by_sequence = (loss * p["mask"]).sum(-1) / p["mask"].sum(-1).clamp_min(1)
    return by_sequence.mean()


def ours(p: Inputs, constrained: bool) -> Tensor:
    """Compute the loss with repo_loss."""
    if not constrained:
        return repo_loss(p["logits"], p["ids"], p["old"], p["rewards"]).loss
    return repo_loss(
        p["logits"], p["ids"], p["old"], p["rewards"], costs=p["costs"], lam=LAM, ref_logps=p["ref"], beta=BETA,
        response_mask=p["mask"], loss_agg_mode="seq-mean-token-mean",
    ).loss  # fmt: skip


def repeated(loss: Callable[[Inputs, bool], Tensor], p: Inputs, constrained: bool) -> Callable[[], Outputs]:
    """Return a call that runs forward and backward CALLS times on one thread and returns (loss, gradient)."""
    p = {**p, "logits": p["logits"].requires_grad_()}

    def call() -> Outputs:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(CALLS):
            p["logits"].grad = None
            value = loss(p, constrained)
            value.backward()
        torch.set_num_threads(threads)
        return value.detach(), p["logits"].grad

    return call


def setup(constrained: bool) -> Setup:
    """Set up both ways."""
    p = make_inputs()
    in_fp64 = {name: v.double() if v.is_floating_point() else v for name, v in p.items()}
    ways = {
        "torch eager": Way(repeated(plain, p, constrained), work=CALLS, tolerance=1e-5),
        "repo_loss": Way(repeated(ours, p, constrained), OURS, CALLS, 1e-5),
    }
    formula = f"{CALLS} calls of {SEQUENCES} x {LENGTH} x {VOCABULARY}, fp32, forward and backward, one thread"
    return Setup(ways, "repo_loss", "calls", formula, expected=repeated(plain, in_fp64, constrained))


def test_call(measure, case) -> None:
    """Measure small calls."""
    measure(case, rounds=31)
