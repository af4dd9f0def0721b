"""What the Triton kernel `prepare` finds of the sequences of a loss, of any number and length."""

from __future__ import annotations

import pytest
import torch

from repo_kernels import repo_loss, selective_log_softmax
from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.codes import AGGREGATIONS, IGNORED, SCALARS
from repo_kernels.backends.eager import dense
from repo_kernels.backends.interface import Loss
from repo_kernels.backends.triton import launch, variants
from repo_kernels.backends.triton.forms import Target
from tests.support.kernels.cases import row_arguments
from tests.support.kernels.option_sets import CALLS, make_call
from tests.support.kernels.row_cases import make_code

LAYOUTS = {
    "one long sequence": (1, 2600),
    "nine sequences": (9, 300),
    "forty sequences": (40, 70),
    "sequences of one token": (2100, 1),
    "tokens": 2100,
    "packed": [0, 0, 7, 1107, 1107, 1107, 1140, 1205],
    "dead head and tail": [5, 5, 1200, 1300],
    "many packed": [*range(0, 2000, 40), 2001],
    "beyond the rows": [0, 9, 4000, 5000],
}
SCALAR_VALUES = tuple(0.5 + 0.25 * place for place in range(len(SCALARS)))


@pytest.mark.parametrize("divisor", [False, True], ids=["counts", "divisor"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.pairwise
def test_the_weights_and_the_sequences_of_rows_are_those_of_the_eager_backend(
    layout: str, aggregation: str, divisor: bool
) -> None:
    shape, bounds = LAYOUTS[layout], None
    if isinstance(shape, list):
        bounds = torch.tensor(shape, dtype=torch.int32)
    leading = (2100,) if bounds is not None else shape if isinstance(shape, tuple) else (shape,)
    g = torch.Generator().manual_seed(1)
    ids = torch.where(torch.rand(leading, generator=g) < 0.2, IGNORED, 1)
    mask = torch.rand(leading, generator=g) < 0.8
    mode = AGGREGATIONS.index(aggregation)
    divisor = divisor and mode not in (codes.TOKEN_SUM, codes.NO_AGGREGATION)
    code = make_code(aggregation=mode, divisor=divisor)
    arguments = row_arguments(ids, response_mask=mask, cu_seqlens=bounds, reward_advantages=torch.zeros(leading))
    loss, like = Loss(arguments, SCALAR_VALUES, code.pack(), 0.0, 0), torch.zeros(*leading, 1)
    prepared, expected = gpu.prepare(like, loss), dense.prepare(like, loss)
    assert prepared.shared[: len(SCALARS)].tolist() == list(SCALAR_VALUES)
    live = expected.live
    total = prepared.shared[len(SCALARS)]
    if mode == codes.SEQ_TOKEN_MEAN:
        total = total * prepared.counts[expected.sequence]
    weights = torch.where(live, 1 / total, 0.0)
    torch.testing.assert_close(weights, expected.values["weights"], rtol=2e-7, atol=0)
    if bounds is not None:
        index = torch.arange(2100)
        inside = (index >= bounds[0]) & (index < bounds[-1])
        assert prepared.sequence_of.equal(torch.where(inside, expected.sequence, -1).int())


def test_a_tile_has_as_many_sequences_as_there_are_up_to_32() -> None:
    target, seen = Target(32), {}
    for count, sequences in ((0, 0), (5, 1), (100, 7), (100, 8), (100, 31), (4000, 1000), (7, 7), (3, 9)):
        chosen = variants.sequence_variant("reduce", count, sequences, target).constexprs
        assert chosen["S"] * chosen["P"] == variants.TILE
        seen[count, sequences] = chosen["S"]
    assert seen == {
        (0, 0): 1024, (5, 1): 1, (100, 7): 1, (100, 8): 8, (100, 31): 8, (4000, 1000): 32, (7, 7): 1024, (3, 9): 1024,
    }  # fmt: skip


@pytest.mark.usefixtures("real_blocks")
def test_every_variant_that_a_call_takes_is_one_that_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed is compiled ahead of time for every target; nothing else may reach a GPU."""
    names: set[str] = set()
    monkeypatch.setattr(launch, "launch", lambda variant, device, programs, *rest: names.add(variant.name))
    for layout, options in CALLS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            logits, arguments = make_call(layout, options, dtype)
            repo_loss(logits.requires_grad_(), **arguments, backend="triton").loss.sum().backward()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (3, 20_000, 100_000):
            logits, ids = torch.zeros(1, columns, dtype=dtype, requires_grad=True), torch.zeros(1, dtype=torch.int64)
            repo_loss(logits, ids, None, torch.ones(1), backend="triton").loss.backward()
            for options in ({}, {"return_entropy": True}, {"softcap": 5.0}):
                logps = selective_log_softmax(logits, ids, **options, backend="triton")
                (logps[0] if isinstance(logps, tuple) else logps).sum().backward()
    listed = {variant.name for variant in variants.variants()}
    assert names <= listed
    assert {name.split("-")[0] for name in names} == {"prepare", "fused", "reduce", "scale", "statistics", "apply"}
