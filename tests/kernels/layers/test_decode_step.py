"""The parts of a decode step on a GPU, in Triton's interpreter, beside PyTorch."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from repo_kernels.backends.cpu import extension
from repo_kernels.layers import decode_attention as attention
from repo_kernels.layers.decode_attention import decode_attention
from repo_kernels.layers.decode_layer import add_norm, gate, place_heads
from repo_kernels.layers.sampling import sample_tokens

needs_cpp = pytest.mark.skipif(not extension.available(), reason="the C++ backend was not built")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # half a unit of the result's last place


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(heads: int, key_heads: int, columns: int, length: int, dtype: torch.dtype, rows: int = 3) -> list[Tensor]:
    """Query, keys and values; what lies outside the columns that are seen is not finite."""
    query = draw(rows, heads, columns, dtype=dtype)
    keys, values = (draw(rows, key_heads, length, columns, dtype=dtype, seed=seed) for seed in (1, 2))
    return [query, keys, values]


def by_sdpa(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, column: int, scale: float) -> Tensor:
    """In fp64, each row alone without a mask."""
    rows = []
    for i, start in enumerate(starts.tolist()):
        k, v = (x[i : i + 1, :, start : column + 1].double() for x in (keys, values))
        out = scaled_dot_product_attention(query[i : i + 1, :, None].double(), k, v, scale=scale, enable_gqa=True)
        rows.append(out[0, :, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "columns"), [(14, 2, 64), (4, 4, 16), (6, 3, 80)])
@pytest.mark.parametrize(("length", "column"), [(32, 30), (300, 299), (300, 70)])
def test_attention_is_that_of_each_row_alone(
    backend: str, dtype: torch.dtype, heads: int, key_heads: int, columns: int, length: int, column: int
) -> None:
    query, keys, values = problem(heads, key_heads, columns, length, dtype)
    starts = torch.tensor([0, column // 2, column])
    expected = by_sdpa(query, keys, values, starts, column, 0.3)
    for x in (keys, values):  # whatever earlier batches left there
        x[:, :, column + 1 :] = torch.nan if backend == "triton" else 7.0
        x[1, :, : column // 2] = 1e4
    got = decode_attention(query, keys, values, starts, torch.tensor([column]), 0.3, backend=backend)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))


@needs_triton
@pytest.mark.parametrize("window", [1, 40, 129, 500])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_windows_and_softcaps_are_those_of_the_definition(window: int, softcap: float) -> None:
    query, keys, values = problem(8, 2, 32, 272, torch.float32)
    arguments = query, keys, values, torch.tensor([0, 100, 260]), torch.tensor([261]), 0.3, window, softcap
    expected = decode_attention(*(x.double() if i < 3 else x for i, x in enumerate(arguments)))  # type: ignore[union-attr, arg-type]
    got = decode_attention(*arguments, backend="triton")  # type: ignore[arg-type]
    assert (got - expected).abs().max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [16, 300])
def test_a_row_that_sees_nothing_is_zero(backend: str, length: int) -> None:
    query, keys, values = problem(4, 2, 16, length, torch.float32)
    starts = torch.tensor([0, length, 4])
    got = decode_attention(query, keys, values, starts, torch.tensor([10]), 1.0, backend=backend)
    assert (got[1] == 0).all()
    assert got.isfinite().all()


def test_what_the_kernel_does_not_take_is_said_by_name() -> None:
    query, keys, values = problem(4, 2, 8, 16, torch.float32)
    starts, column = torch.zeros(3, dtype=torch.int64), torch.tensor([3])
    assert "heads of 16 to 256 columns" in attention.why_eager(query, keys, values)
    with pytest.raises(ValueError, match="cannot be used: the attention kernel takes heads of 16"):
        decode_attention(query, keys, values, starts, column, 1.0, backend="triton")
    with pytest.raises(ValueError, match="backend must be 'triton', 'eager' or None; got 'cpu'"):
        decode_attention(query, keys, values, starts, column, 1.0, backend="cpu")
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(query.half(), keys, values, starts, column, 1.0)
    with pytest.raises(ValueError, match=r"starts \(3,\)"):
        decode_attention(query, keys, values, starts[:2], column, 1.0)
    with pytest.raises(ValueError, match="multiple of 2 key heads; got 3"):
        decode_attention(query[:, :3], keys, values, starts, column, 1.0)


@needs_triton
@pytest.mark.parametrize(("hidden", "out"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16),
                                             (torch.bfloat16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("width", [64, 896])
def test_residual_and_norm(hidden: torch.dtype, out: torch.dtype, width: int) -> None:
    weight, delta = draw(width, seed=3, dtype=hidden), draw(5, width, seed=4, dtype=out)
    for more in (None, delta):
        x, y = (draw(5, width, dtype=hidden) for _ in range(2))
        expected, got = add_norm(x, more, weight, 1e-5, out), add_norm(y, more, weight, 1e-5, out, "triton")
        assert torch.equal(x, y)
        assert got.dtype == out
        torch.testing.assert_close(got, expected)


@needs_triton
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("columns", [16, 80])
def test_heads_are_rotated_and_put_into_the_cache(normed: bool, columns: int) -> None:
    qkv = draw(3, (6 + 2 * 2) * columns)
    angles = draw(3, columns // 2, seed=1).repeat(1, 2)
    norms = (draw(columns, seed=2), draw(columns, seed=3)) if normed else None
    found = []
    for backend in ("eager", "triton"):
        caches = [torch.full((3, 2, 20, columns), 9.0) for _ in range(2)]
        query = place_heads(qkv, angles.cos(), angles.sin(), norms, *caches, torch.tensor([7]), 6, 1e-5, backend)
        found.append((query, *caches))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (found[1][1][:, :, :7] == 9).all()
    assert (found[1][1][:, :, 8:] == 9).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(dtype: torch.dtype) -> None:
    x = draw(3, 2 * 1104, dtype=dtype) * 30
    torch.testing.assert_close(gate(x, "triton"), gate(x))


BY = [pytest.param("triton", marks=needs_triton), pytest.param("cpu", marks=needs_cpp)]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_those_of_the_whole_sum_in_fp64(dtype: torch.dtype, by: str) -> None:
    """Rows of several shapes, with impossible tokens and a block of them; a last block that is not full."""
    logits = draw(8, 5000) * torch.tensor([[0.0], [1.0], [4.0], [20.0], [1.0], [1.0], [3.0], [3.0]])
    logits[4, :3000], logits[5, 2048:4096], logits[6, ::2], logits[7, -1] = -torch.inf, -torch.inf, -torch.inf, 60.0
    logits = logits.to(dtype).repeat(3, 1)
    logits = logits.float() if by == "cpu" else logits
    uniforms = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniforms[:3], uniforms[8:16] = 0.0, 1 - 2**-53
    for temperature in (1.0, 0.7):
        expected, expected_logps = sample_tokens(logits, uniforms, temperature, 1.0, "eager")
        tokens, logps = sample_tokens(logits, uniforms, temperature, 1.0, by)
        different = (tokens != expected).nonzero().flatten().tolist()
        assert set(different) <= {*range(8, 16)}  # at the end the definition may take a token that is impossible
        assert (logits[torch.arange(24), tokens] > -torch.inf).all()
        same = tokens == expected
        torch.testing.assert_close(logps[same], expected_logps[same], rtol=1e-6, atol=2e-6)
        assert logps.dtype == torch.float32
        assert tokens.dtype == torch.int64


@pytest.mark.parametrize("by", BY)
def test_a_uniform_number_near_a_boundary_decides_between_its_two_tokens(by: str) -> None:
    logits = draw(1, 5003) * 2
    probs = torch.softmax(logits, -1)
    cdf = (probs.cumsum(-1, dtype=torch.float64) / probs.sum(dtype=torch.float64))[0]
    places = torch.arange(0, 4999, 700)
    for offset in (-1e-9, 1e-9, -2e-7, 2e-7):
        uniforms = (cdf[places] + offset).clamp(0, 1 - 1e-12)
        expected, _ = sample_tokens(logits.expand(len(places), -1), uniforms, 1.0, 1.0, "eager")
        tokens, _ = sample_tokens(logits.expand(len(places), -1), uniforms, 1.0, 1.0, by)
        if abs(offset) > 1e-7:
            assert torch.equal(tokens, expected)
        else:
            assert ((tokens - expected).abs() <= 1).all()


@pytest.mark.parametrize("by", BY)
def test_top_p_is_left_to_pytorch(by: str) -> None:
    with pytest.raises(ValueError, match="top_p below 1"):
        sample_tokens(draw(1, 9), torch.zeros(1), 1.0, 0.9, by)


@needs_cpp
def test_a_hundred_thousand_draws_are_those_of_the_whole_sum() -> None:
    """But for uniform numbers within rounding of a boundary."""
    logits = (draw(200, 4099) * 3).repeat(500, 1)
    uniforms = torch.rand(len(logits), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens, logps = sample_tokens(logits, uniforms, 0.8, 1.0, "cpu")
    exact = (logits[:200].double() / 0.8).log_softmax(-1)
    cdf = torch.nn.functional.pad(exact.exp().cumsum(-1), (1, 0))
    rows = torch.arange(len(logits)) % 200
    assert bool((cdf[rows, tokens] - 1e-7 <= uniforms).all())
    assert bool((uniforms <= cdf[rows, tokens + 1] + 1e-7).all())
    torch.testing.assert_close(logps.double(), exact[rows, tokens], rtol=1e-6, atol=2e-6)


@needs_cpp
def test_a_row_of_nan_and_other_types_in_cpp() -> None:
    tokens, logps = sample_tokens(torch.full((1, 9), torch.nan), torch.zeros(1), 1.0, 1.0, "cpu")
    assert 0 <= tokens.item() < 9
    assert logps.isnan().all()
    for logits in (torch.zeros(0, 9), torch.zeros(2, 9).bfloat16()):
        with pytest.raises(ValueError, match="backend='cpu' cannot be used: logits must be float32 on the CPU"):
            sample_tokens(logits, torch.zeros(len(logits)), 1.0, 1.0, "cpu")


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "heads", "key_heads", "columns"), [(64, 14, 2, 64), (64, 32, 8, 128), (3, 8, 8, 256)])
def test_one_graph_attends_at_every_length(
    dtype: torch.dtype, rows: int, heads: int, key_heads: int, columns: int
) -> None:
    query, keys, values = (x.cuda() for x in problem(heads, key_heads, columns, 640, dtype, rows))
    starts = (torch.arange(rows) % 40).cuda()
    column, scale = torch.tensor([0]).cuda(), columns**-0.5
    decode_attention(query, keys, values, starts, column, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode_attention(query, keys, values, starts, column, scale)
    for at in (0, 41, 300, 639):
        column.fill_(at)
        graph.replay()
        expected = decode_attention(query, keys, values, starts, column, scale, backend="eager")
        assert (got.double() - expected.double()).abs().max() <= 4 * TOLERANCE[dtype] * max(1.0, expected.abs().max())


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
def test_tokens_of_many_draws_are_those_of_the_whole_sum(dtype: torch.dtype, vocabulary: int) -> None:
    logits = (draw(64, vocabulary) * torch.linspace(0.1, 5, 64)[:, None]).to(dtype).cuda()
    different = 0
    for seed in range(32):
        uniforms = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cuda()
        expected, expected_logps = sample_tokens(logits, uniforms, 0.9, 1.0, "eager")
        tokens, logps = sample_tokens(logits, uniforms, 0.9, 1.0)
        different += int((tokens != expected).sum())
        same = tokens == expected
        # on CUDA PyTorch multiplies by the reciprocal of the temperature: one rounding more of logits up to 25
        torch.testing.assert_close(logps[same], expected_logps[same], rtol=1e-6, atol=1e-5)
    assert different <= 2


@GPU
@pytest.mark.gpu
def test_the_parts_of_a_layer_on_a_gpu() -> None:
    hidden, delta, weight = draw(64, 896).cuda(), draw(64, 896, seed=1, dtype=torch.bfloat16).cuda(), draw(896).cuda()
    qkv, angles = draw(64, 18 * 64, dtype=torch.bfloat16).cuda(), draw(64, 32).repeat(1, 2).cuda()
    gates = draw(64, 2 * 4864, dtype=torch.bfloat16).cuda()
    found = []
    for backend in ("eager", "triton"):
        x, caches = hidden.clone(), [torch.zeros(64, 2, 128, 64, dtype=torch.bfloat16).cuda() for _ in range(2)]
        y = add_norm(x, delta, weight, 1e-6, torch.bfloat16, backend)
        query = place_heads(
            qkv, angles.cos(), angles.sin(), None, *caches, torch.tensor([5]).cuda(), 14, 1e-6, backend
        )  # fmt: skip
        found.append((x, y, query, *caches, gate(gates, backend)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
