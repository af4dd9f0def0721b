"""The Triton kernels over flat rows, in Triton's interpreter, against an fp64 oracle of log_softmax and terms.py."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repo_kernels.backends import interface
from repo_kernels.backends.eager import terms
from repo_kernels.backends.interface import SCALARS, TOKENS, VALUES, Code, LossRows, gradient_buffer

from .interpreter import round_as_hardware

pytest.importorskip("triton", reason="triton is not installed")

from repo_kernels.backends import triton as gpu
from repo_kernels.backends.triton import variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PIECES = 64  # of 16 bytes in a block, in most tests
BLOCK = {dtype: PIECES * 16 // dtype.itemsize for dtype in DTYPES}
PLAIN = Code(interface.COST_NONE, interface.KL_NONE, kl_ratio=False, normalize=False, on_policy=False)
KL = ("none", "k1", "k2", "k3", "full")


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        round_as_hardware(patch)
        with np.errstate(all="ignore"):
            yield


def forget_variants() -> None:
    for chosen in (variants.fused_variant, variants.statistics_variant, variants.apply_variant, variants.scale_variant):
        chosen.cache_clear()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks so small that a row of a few hundred logits has several."""
    if "real_blocks" not in request.fixturenames:
        monkeypatch.setattr(variants, "BLOCK_PIECES", PIECES)
    forget_variants()
    yield
    forget_variants()


@pytest.fixture
def real_blocks() -> None:
    """Blocks as on a GPU."""


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length are read twice."""
    monkeypatch.setattr(variants, "HELD_BLOCKS", (0,))


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)
    return error.item()


def placed(values: Tensor, stride: int | None = None, offset: int = 0) -> Tensor:
    """(n, V) values at a row stride and a base of the caller's choice; what lies between the rows is NaN."""
    count, columns = values.shape
    stride = columns if stride is None else stride
    storage = torch.full((offset + count * stride + 16,), torch.nan, dtype=values.dtype)
    view = storage.as_strided((count, columns), (stride, 1), offset)
    return view.copy_(values)


def random_logits(count: int, columns: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0) -> Tensor:
    return (torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def make_rows(logits: Tensor, code: Code = PLAIN, softcap: float = 0.0, entropy: int = 0, **scalars: float) -> LossRows:
    """A loss over the rows of (n, V) logits; old and reference log-probabilities are near the current ones."""
    count, columns = logits.shape
    generator = torch.Generator().manual_seed(columns)
    ids = torch.randint(columns, (count,), generator=generator)
    noise = torch.randn(len(VALUES), count, generator=generator)
    coefficients = {"lam": 0.7, "beta": 0.3, "eps_low": 0.2, "eps_high": 0.25, "entropy_coef": 0.2 * (entropy > 1)}
    coefficients |= {"temperature": 1.0, "grad_scale": 1.0, "dual_clip": torch.inf} | scalars
    vector = torch.tensor([coefficients[name] for name in SCALARS])
    logps = statistics_of(logits.double(), None, ids, vector.double(), softcap)[0].float()
    values = dict(zip(VALUES, noise, strict=True))
    values["old_logps"] = torch.where(logps.isfinite(), logps, -3.0) + 0.3 * noise[VALUES.index("old_logps")]
    values["ref_logps"] = torch.where(logps.isfinite(), logps, -3.0) + 0.5 * noise[VALUES.index("ref_logps")]
    for name in ("is_weights", "weights"):
        values[name] = values[name].abs() + 0.1
    return LossRows(ids, torch.stack([values[name] for name in VALUES]), vector, code.pack(), softcap, entropy)


def statistics_of(
    logits: Tensor, ref: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, full KL), each (n,), of (n, V) logits in their own dtype."""

    def log_probs(z: Tensor) -> Tensor:
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z / scalars[SCALARS.index("temperature")], -1)

    def mean(weights: Tensor, values: Tensor) -> Tensor:
        return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)

    log_p = log_probs(logits)
    p = log_p.exp()
    kl = torch.zeros_like(log_p[:, 0]) if ref is None else mean(p, log_p - log_probs(ref))
    return log_p.gather(1, ids[:, None]).squeeze(1), -mean(p, log_p), kl


@dataclass(frozen=True)
class Expected:
    """What a loss gives, in fp64: losses (n,), tokens (13, n), gradient (n, V), slopes (3, n)."""

    losses: Tensor
    tokens: Tensor
    grad: Tensor
    slopes: Tensor


def oracle(logits: Tensor, ref: Tensor | None, rows: LossRows) -> Expected:
    """Live rows through fp64 autograd of the statistics, with the scalars of terms.py; dead rows are 0."""
    live = rows.ids != interface.IGNORED
    count, columns = logits.shape
    losses, tokens = torch.zeros(count).double(), torch.zeros(len(TOKENS), count).double()
    grad, slopes = torch.zeros(count, columns).double(), torch.zeros(3, count).double()
    if not live.any():
        return Expected(losses, tokens, grad, slopes)
    z = logits[live].double().requires_grad_()
    scalars, code = rows.scalars.double(), Code.unpack(rows.code)
    ref64 = None if ref is None else ref[live].double()
    logps, entropy, kl = statistics_of(z, ref64, rows.ids[live], scalars, rows.softcap)
    inputs = terms.token_inputs(rows.values[:, live].double(), scalars, code)
    chosen = entropy.detach() if rows.entropy else None
    found = terms.token_terms(
        inputs, logps.detach(), chosen, None if ref is None else kl.detach(), terms.coefficients(scalars),
        KL[code.kl], code.kl_ratio,
    )  # fmt: skip
    scale = scalars[SCALARS.index("grad_scale")]
    slopes_live = torch.stack([found.g_logp, found.g_entropy, found.g_kl]) * scale
    finite = torch.where(logps.isfinite(), logps, 0.0)
    (slopes_live[0] * finite + slopes_live[1] * entropy + slopes_live[2] * kl).sum().backward()
    assert z.grad is not None
    lost = ~logps.isfinite()
    if lost.any():  # log_softmax at -inf has no derivative: g_logp (1[v = y] - p_v)
        p = torch.softmax(z.detach()[lost] / scalars[SCALARS.index("temperature")], -1)
        target = torch.nn.functional.one_hot(rows.ids[live][lost], columns)
        z.grad[lost] = slopes_live[0][lost][:, None] * (target - p) / scalars[SCALARS.index("temperature")]
    losses[live], grad[live], slopes[:, live] = found.loss, z.grad, slopes_live
    tokens[:, live] = terms.token_rows(found, inputs.unsafe, logps.detach(), chosen)
    return Expected(losses, tokens, grad, slopes)


def check(losses: Tensor, tokens: Tensor, grad: Tensor | None, expected: Expected, dtype: torch.dtype) -> None:
    """Within the contract's tolerances."""
    torch.testing.assert_close(losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.double(), expected.tokens, rtol=1e-5, atol=1e-5)
    for name in ("logp", "entropy"):
        row = TOKENS.index(name)
        finite = expected.tokens[row].isfinite()
        assert relative(tokens[row][finite], expected.tokens[row][finite]) <= 1e-6, name
    if grad is not None:
        least = 2.0**-14 if dtype == torch.float16 else 0.0
        large = expected.grad.abs() >= least
        assert relative(grad[large], expected.grad[large]) <= GRADIENT_TOLERANCE[dtype]
        assert grad.isfinite().all()


def run_and_check(logits: Tensor, rows: LossRows, ref: Tensor | None = None) -> Tensor:
    """fused, out of place, against the oracle."""
    grad = gradient_buffer(logits)
    losses, tokens = gpu.fused(logits, ref, rows, grad)
    check(losses, tokens, grad, oracle(logits, ref, rows), logits.dtype)
    return grad


def kill(rows: LossRows, dead: list[int]) -> LossRows:
    """Rows whose id is -100 and whose values are not numbers."""
    ids, values = rows.ids.clone(), rows.values.clone()
    ids[dead] = interface.IGNORED
    values[:, dead] = torch.nan
    values[0, dead[0]] = torch.inf
    return replace(rows, ids=ids, values=values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33, 500])
def test_resident_rows(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, columns, dtype)
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_VALUE):
        run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1.0, 1.4, 2.0, 2.7, 3.0])
def test_resident_rows_of_several_blocks(blocks: float, dtype: torch.dtype) -> None:
    logits = random_logits(2, int(blocks * BLOCK[dtype]), dtype)
    run_and_check(logits, make_rows(logits, entropy=interface.ENTROPY_VALUE, grad_scale=256.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 33, 1000, 2051])
@pytest.mark.usefixtures("swept")
def test_swept_rows(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, columns, dtype)
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_VALUE, interface.ENTROPY_GRADIENT):
        run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))


@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize(
    ("columns", "dtype"), [(50257, torch.bfloat16), (24578, torch.float32), (65537, torch.float16)]
)
@pytest.mark.usefixtures("real_blocks")
def test_long_rows(columns: int, dtype: torch.dtype, entropy: int) -> None:
    logits = random_logits(2, columns, dtype)
    rows = make_rows(logits, entropy=entropy, grad_scale=512.0)
    # the targets' pieces: in the first block, in the last whole one, in the short one, in the edges
    for ids in ([5, 40000 % columns], [columns - 20, columns - 1]):
        run_and_check(logits, replace(rows, ids=torch.tensor(ids)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
def test_every_alignment_of_base_and_stride(dtype: torch.dtype, entropy: int) -> None:
    values = random_logits(2, 75, dtype)
    rows = make_rows(values, entropy=entropy, grad_scale=64.0)
    expected = oracle(values, None, rows)
    for offset in range(16 // dtype.itemsize):
        logits = placed(values, 75 + (offset * 3) % 7, offset)
        grad = gradient_buffer(logits) if offset % 3 else torch.empty(2, 75, dtype=dtype)
        losses, tokens = gpu.fused(logits, None, rows, grad)
        check(losses, tokens, grad, expected, dtype)
        assert logits.equal(values)
        gpu.fused(logits, None, rows, logits)
        assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_longer_sequence(dtype: torch.dtype) -> None:
    whole = random_logits(3 * 4, 37, dtype).view(3, 4, 37)
    logits, plain = whole[:, :-1], whole[:, :-1].reshape(9, 37)
    rows = make_rows(plain, grad_scale=64.0)
    grad = gradient_buffer(logits)
    losses, tokens = gpu.fused(logits, None, rows, grad)
    check(losses, tokens, grad.reshape(9, 37), oracle(plain, None, rows), dtype)
    last = whole[:, -1].clone()
    gpu.fused(logits, None, rows, logits)
    assert whole[:, -1].equal(last)
    assert logits.equal(grad)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_full_kl(softcap: float, full: bool, dtype: torch.dtype) -> None:
    code = replace(PLAIN, kl=interface.KL_FULL) if full else PLAIN
    for columns, entropy in (
        (7, interface.ENTROPY_NONE),
        (333, interface.ENTROPY_VALUE),
        (1501, interface.ENTROPY_GRADIENT),
    ):
        logits = placed(random_logits(2, columns, dtype), columns + 1, 3)
        ref = random_logits(2, columns, dtype, seed=1) if full else None  # lies differently: a copy is made
        rows = make_rows(logits, code, softcap, entropy, temperature=0.8, grad_scale=256.0)
        run_and_check(logits, rows, ref)


@pytest.mark.parametrize("kl", [interface.KL_NONE, interface.KL_K1, interface.KL_K2, interface.KL_K3])
@pytest.mark.parametrize(
    "cost", [interface.COST_NONE, interface.COST_GIVEN, interface.COST_GATED, interface.COST_HINGE]
)
def test_options_of_the_token_terms(cost: int, kl: int) -> None:
    logits = random_logits(8, 41, torch.float32)
    for kl_ratio, normalize, on_policy in ((False, False, False), (True, True, False), (True, False, True)):
        code = Code(cost, kl, kl_ratio, normalize, on_policy)
        rows = make_rows(logits, code, temperature=1.3, dual_clip=1.2 if normalize else torch.inf)
        rows.values[VALUES.index("old_logps"), :3] += torch.tensor([40.0, -40.0, 3.0])  # clamped, clamped, clipped
        rows.values[VALUES.index("ref_logps"), 3:6] += torch.tensor([40.0, -40.0, 3.0])
        run_and_check(logits, rows)


def test_kinks_fall_on_the_side_of_terms() -> None:
    logits = torch.zeros(4, 4)
    rows = make_rows(logits, replace(PLAIN, cost=interface.COST_GATED), eps_low=0.5, eps_high=1.0)
    logps = torch.full((4,), -float(np.log(np.float32(4.0))))
    values = rows.values
    values[VALUES.index("old_logps")] = logps
    values[VALUES.index("costs")] = torch.tensor([1.0, 1.0, 2.0, 0.0])
    values[VALUES.index("cost_limits")] = 1.0
    values[VALUES.index("reward_advantages")] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    _, tokens = gpu.fused(logits, None, rows, None)
    assert tokens[TOKENS.index("ratio")].tolist() == [1.0] * 4
    assert tokens[TOKENS.index("tokens_unsafe")].tolist() == [0.0, 0.0, 1.0, 0.0]
    # eps = 0: rho = 1 is on both bounds and clipped by neither
    no_room = rows.scalars.clone()
    no_room[[SCALARS.index("eps_low"), SCALARS.index("eps_high")]] = 0.0
    grad = torch.empty_like(logits)
    _, tokens = gpu.fused(logits, None, replace(rows, scalars=no_room), grad)
    assert not tokens[5:9].any()
    assert grad.count_nonzero() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
def test_dead_rows_are_not_read(dtype: torch.dtype, entropy: int) -> None:
    logits = placed(random_logits(5, 83, dtype), 85, 1)
    dead = [0, 3]
    rows = kill(make_rows(logits, entropy=entropy, grad_scale=64.0), dead)
    logits[dead] = torch.nan
    grad = run_and_check(logits, rows)
    assert not grad[dead].any()
    state = gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, entropy)
    assert not state[:, dead].any()
    gpu.fused(logits, None, rows, logits)
    assert logits.equal(grad)
    storage = logits.as_strided((5, 85), (85, 1), 1)
    assert storage[:, 83:].isnan().all()


def test_all_rows_dead_and_no_rows() -> None:
    logits = torch.full((2, 9), torch.nan)
    rows = kill(make_rows(torch.zeros(2, 9)), [0, 1])
    grad = torch.ones(2, 9)
    losses, tokens = gpu.fused(logits, None, rows, grad)
    assert not losses.any()
    assert not tokens.any()
    assert not grad.any()
    none = replace(rows, ids=rows.ids[:0], values=rows.values[:, :0])
    losses, tokens = gpu.fused(logits[:0], None, none, grad[:0])
    assert losses.shape == (0,)
    assert tokens.shape == (13, 0)


@pytest.mark.parametrize("softcap_and_kl", [False, True])
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("swept")
def test_infinite_logits(dtype: torch.dtype, entropy: int, softcap_and_kl: bool) -> None:
    columns = 2 * BLOCK[dtype] + 100
    logits = random_logits(3, columns, dtype)
    logits[0, : BLOCK[dtype]] = -torch.inf  # a leading block
    logits[1, 1::2] = -torch.inf
    logits[2, 7] = -torch.inf
    code, ref = PLAIN, None
    if softcap_and_kl:
        code, ref = replace(PLAIN, kl=interface.KL_FULL), random_logits(3, columns, dtype, seed=2)
        ref[logits == -torch.inf] = -torch.inf
    rows = make_rows(logits, code, entropy=entropy, grad_scale=256.0)
    run_and_check(logits, replace(rows, ids=torch.tensor([columns - 3, 200, 8])), ref)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_at_minus_infinity(dtype: torch.dtype) -> None:
    logits = random_logits(2, 50, dtype)
    rows = replace(make_rows(logits, grad_scale=64.0), ids=torch.tensor([3, 20]))
    logits[[0, 1], [3, 20]] = -torch.inf
    rows.values[VALUES.index("old_logps"), 1] = -torch.inf  # impossible before, too: rho = 1
    grad = run_and_check(logits, rows)
    _, tokens = gpu.fused(logits, None, replace(rows, entropy=interface.ENTROPY_GRADIENT), grad)
    assert tokens[0].isinf().all()
    assert grad.isfinite().all()
    assert tokens[TOKENS.index("ratio"), 1] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_VALUE, interface.ENTROPY_GRADIENT])
def test_offsets(dtype: torch.dtype, entropy: int) -> None:
    for offset in (-150.0, 1e4):
        logits = (random_logits(4, 777, torch.float32) + offset).to(dtype)
        grad = run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))
        assert grad.isfinite().all()


@pytest.mark.parametrize("columns", [8, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_an_almost_certain_target(columns: int, dtype: torch.dtype) -> None:
    tops = [2.0, 9.0, 12.0, 16.0, 20.0, 34.0]
    logits = (random_logits(len(tops), columns, torch.float32) / 4).to(dtype)
    ids = torch.arange(len(tops)) % columns
    logits[torch.arange(len(tops)), ids] = torch.tensor(tops, dtype=dtype)
    rows = make_rows(logits, replace(PLAIN, on_policy=True))
    rows.values[VALUES.index("reward_advantages")] = 1.0
    for name in ("is_weights", "weights"):
        rows.values[VALUES.index(name)] = 1.0
    rows = replace(rows, ids=ids)
    grad = torch.empty_like(logits)
    gpu.fused(logits, None, rows, grad)
    state = gpu.statistics(logits, None, ids, rows.scalars, 0.0, 0)
    two_step = torch.empty_like(logits)
    gpu.apply(logits, None, ids, state, oracle(logits, None, rows).slopes.float(), rows.scalars, 0.0, two_step)
    log_p = torch.log_softmax(logits.double(), -1).gather(1, ids[:, None]).squeeze(1)
    rest = -torch.expm1(log_p)
    for gradient in (grad, two_step):
        error = (-gradient.gather(1, ids[:, None]).squeeze(1).double() - rest).abs()
        assert (error <= torch.where(rest >= 1e-4, 4e-3 * rest, 2.0**-24)).all()


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
def test_an_id_outside_the_row_gives_nan_in_that_row_alone(bad: int) -> None:
    logits = random_logits(3, 50, torch.float32)
    rows = make_rows(logits)
    good = oracle(logits, None, rows)
    rows.ids[1] = bad
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT):
        grad = torch.zeros_like(logits)
        losses, tokens = gpu.fused(logits, None, replace(rows, entropy=entropy), grad)
        assert losses[1].isnan()
        assert tokens[0, 1].isnan()
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
    assert gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, 1)[0, 1].isnan()
    assert relative(losses[[0, 2]], good.losses[[0, 2]]) < 1e-5


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_step_form_agrees_with_the_fused_one(softcap: float, full: bool, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 301, dtype), 303, 5)
    ref = placed(random_logits(4, 301, dtype, seed=3), 303, 5) if full else None
    code = replace(PLAIN, kl=interface.KL_FULL) if full else PLAIN
    rows = make_rows(logits, code, softcap, interface.ENTROPY_GRADIENT, grad_scale=64.0)
    rows = kill(rows, [2])
    expected = oracle(logits, ref, rows)
    state = gpu.statistics(logits, ref, rows.ids, rows.scalars, softcap, interface.ENTROPY_VALUE)
    assert relative(state[0], expected.tokens[TOKENS.index("logp")]) <= 1e-6
    assert relative(state[1], expected.tokens[TOKENS.index("entropy")]) <= 1e-6
    if full:
        assert relative(state[2], expected.tokens[TOKENS.index("kl")]) <= 2e-6
    slopes, grad, fused_grad = expected.slopes.float(), gradient_buffer(logits), gradient_buffer(logits)
    gpu.apply(logits, ref, rows.ids, state, slopes, rows.scalars, softcap, grad)
    assert relative(grad, expected.grad) <= GRADIENT_TOLERANCE[dtype]
    gpu.fused(logits, ref, rows, fused_grad)
    assert relative(grad, fused_grad) <= GRADIENT_TOLERANCE[dtype]
    gpu.apply(logits, ref, rows.ids, state, slopes, rows.scalars, softcap, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_place_again_and_alone(entropy: int, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 1237, dtype), 1239, 2)
    rows = make_rows(logits, entropy=entropy, grad_scale=64.0)
    grad, again = gradient_buffer(logits), gradient_buffer(logits)
    first, second = gpu.fused(logits, None, rows, grad), gpu.fused(logits, None, rows, again)
    assert grad.equal(again)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    alone = gradient_buffer(logits[2:3])
    one = replace(rows, ids=rows.ids[2:3], values=rows.values[:, 2:3].contiguous())
    losses, _ = gpu.fused(logits[2:3], None, one, alone)
    assert alone.equal(grad[2:3])
    assert losses.equal(first[0][2:3])
    forward, tokens = gpu.fused(logits, None, rows, None)
    assert forward.equal(first[0])
    assert tokens.equal(first[1])
    gpu.fused(logits, None, rows, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_rows(dtype: torch.dtype) -> None:
    values = random_logits(5, 91, dtype)
    factors = torch.tensor([1.0, -0.3, 0.0, 7.0, 1.0])
    strided = torch.stack([factors, torch.zeros(5)], 1)[:, 0]
    for upstream in (factors, strided, torch.tensor(0.37).expand(5)):
        grad = placed(values, 93, 1)
        gpu.scale_rows(grad, upstream)
        assert grad.equal((values.float() * upstream[:, None]).to(dtype))


def test_variants_fit_the_limit_and_their_warps_the_target() -> None:
    for warp_size in (32, 64):
        found = variants.variants(warp_size)
        assert len(found) <= 48
        assert len({v.name for v in found}) == len(found)
        assert max(v.num_warps for v in found) * warp_size <= 1024
        for v in found:
            assert set(v.signature) == set(v.kernel.arg_names)
