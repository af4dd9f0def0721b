"""Decoding in C++: products with packed weights in fp64, and the steps of a Llama-shaped model written in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repo_kernels.backends.cpu import decoding, extension
from repo_kernels.layers.decoding import Cache, DecoderStack, LayerWeights

pytestmark = [
    pytest.mark.skipif(not extension.available(), reason="the C++ backend was not built"),
    pytest.mark.usefixtures("isa"),
]
HIDDEN, HEADS, KEY_HEADS, COLUMNS, INNER, VOCABULARY = 64, 6, 2, 16, 48, 133
EPSILON, SCALE = 1e-5, 0.3


HALF = torch.bfloat16


def pack(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    memory = decoding.new_memory(decoding.panels_of(len(weight)) * 16 * weight.shape[1], dtype)
    packed = decoding.packed_view(memory, weight.shape[1])
    decoding.pack(weight, packed)
    return packed


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7, 12, 13, 16, 17, 33])
@pytest.mark.parametrize(("outputs", "depth"), [(16, 16), (33, 7), (1, 130), (160, 576)])
def test_products_are_those_of_fp64(rows: int, outputs: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows, depth), torch.randn(outputs, depth), torch.randn(outputs)
    got = decoding.multiply(x, pack(weight), outputs, bias)
    expected = x.double() @ weight.double().t() + bias.double()
    assert got.shape == (2, rows, outputs)
    bound = depth * 2**-24 * (x.double().abs() @ weight.double().abs().t()) + 2**-23 * expected.abs() + 1e-6
    assert bool(((got - expected).abs() <= bound).all())
    assert torch.equal(decoding.multiply(x[0, :1], pack(weight), outputs, bias), got[0, :1])


@pytest.mark.parametrize("rows", [1, 5, 9, 16, 33])
@pytest.mark.parametrize(("outputs", "depth"), [(16, 16), (33, 48), (1, 272), (160, 576)])
def test_products_in_bfloat16_are_those_of_rounded_factors(rows: int, outputs: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(outputs, depth), torch.randn(outputs)
    got = decoding.multiply(x, pack(weight, HALF), outputs, bias)
    a, b = x.to(HALF).double(), weight.to(HALF).double().t()
    expected = a @ b + bias.double()
    bound = depth * 2**-23 * (a.abs() @ b.abs()) + 2**-23 * expected.abs() + 1e-6
    assert bool(((got - expected).abs() <= bound).all())
    assert torch.equal(decoding.multiply(x[-1:], pack(weight, HALF), outputs, bias), got[-1:])


def test_rounding_is_that_of_pytorch() -> None:
    """Ties, the largest numbers, subnormal ones, infinities and NaN; an identity shows them as they are packed."""
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x7F800000, 0x80000000, 0x3F808001, 0xFF7F0000]
    )
    x = torch.zeros(16)
    x[:8] = bits.to(torch.uint32).view(torch.float32)
    for column in range(8):
        one = torch.zeros(1, 16)
        one[0, column] = x[column]
        got = decoding.multiply(torch.eye(16)[column : column + 1], pack(one, HALF), 1)
        expected = one[0, column].to(HALF).float()
        if expected.abs() >= 2**-126 or expected == 0:  # products of subnormal numbers may be 0
            assert got.item() == expected.item() or bool(expected.isinf())
    nan = torch.full((1, 16), torch.nan)
    assert decoding.multiply(torch.ones(1, 16), pack(nan, HALF), 1).isnan().all()


def test_what_cannot_be_packed_in_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16 columns"):
        pack(torch.randn(16, 18), HALF)


class Model:
    """Weights of two layers, and their step in PyTorch."""

    def __init__(self, biases: bool, head_norms: bool) -> None:
        torch.manual_seed(1)
        width = HEADS * COLUMNS

        def matrix(outputs: int, depth: int) -> Tensor:
            return torch.randn(outputs, depth) / depth**0.5

        self.layers = []
        for _ in range(2):
            self.layers.append(
                {
                    "input_norm": torch.rand(HIDDEN) + 0.5,
                    "q": matrix(width, HIDDEN),
                    "k": matrix(KEY_HEADS * COLUMNS, HIDDEN),
                    "v": matrix(KEY_HEADS * COLUMNS, HIDDEN),
                    "qkv_bias": torch.randn((HEADS + 2 * KEY_HEADS) * COLUMNS) if biases else None,
                    "q_norm": torch.rand(COLUMNS) + 0.5 if head_norms else None,
                    "k_norm": torch.rand(COLUMNS) + 0.5 if head_norms else None,
                    "out": matrix(HIDDEN, width),
                    "out_bias": torch.randn(HIDDEN) if biases else None,
                    "post_norm": torch.rand(HIDDEN) + 0.5,
                    "gate": matrix(INNER, HIDDEN),
                    "up": matrix(INNER, HIDDEN),
                    "down": matrix(HIDDEN, INNER),
                }
            )
        self.norm, self.head = torch.rand(HIDDEN) + 0.5, matrix(VOCABULARY, HIDDEN)

    def stack(self, dtype: torch.dtype = torch.float32) -> DecoderStack:
        layers = [LayerWeights(**layer) for layer in self.layers]
        return DecoderStack(layers, self.norm, self.head, HEADS, KEY_HEADS, EPSILON, SCALE, dtype)

    def logits(self, embeddings: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the logits (T, V) of one sequence in fp64. embeddings: (T, H); cos, sin: (T, D)."""
        x, cos, sin = embeddings.double(), cos.double()[:, None], sin.double()[:, None]
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        for layer in self.layers:
            w = {name: None if value is None else value.double() for name, value in layer.items()}
            joined = torch.cat([w["q"], w["k"], w["v"]])
            states = norm(x, w["input_norm"]) @ joined.t()
            states = states if w["qkv_bias"] is None else states + w["qkv_bias"]
            q, k, v = states.view(len(x), -1, COLUMNS).split([HEADS, KEY_HEADS, KEY_HEADS], 1)
            q, k = (y if n is None else norm(y, n) for y, n in ((q, w["q_norm"]), (k, w["k_norm"])))
            q, k = (y * cos + half_turn(y) * sin for y in (q, k))
            k, v = (y.repeat_interleave(HEADS // KEY_HEADS, 1) for y in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
            shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            attended = torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ w["out"].t()
            x = x + (attended if w["out_bias"] is None else attended + w["out_bias"])
            y = norm(x, w["post_norm"])
            x = x + (torch.nn.functional.silu(y @ w["gate"].t()) * (y @ w["up"].t())) @ w["down"].t()
        return norm(x, self.norm.double()) @ self.head.double().t()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def half_turn(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def rotary(length: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * 0.7 ** torch.arange(COLUMNS // 2)
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def decode(
    model: Model,
    embeddings: Tensor,
    capacity: int,
    slots: list[int],
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode sequences (B, T, H) from nothing, in these places of a cache, and return all logits (B, T, V)."""
    stack, (count, length, _) = model.stack(dtype), embeddings.shape
    cache = Cache(2, max(slots) + 1, KEY_HEADS, COLUMNS, capacity)
    cache.keys.fill_(float("nan"))  # what was never written must not be read
    cache.values.fill_(float("nan"))
    cos, sin = rotary(length)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    for t in range(length):
        turn = [x[t].expand(count, -1).contiguous() for x in (cos, sin)]
        lengths = torch.full((count,), t, dtype=torch.int32)
        places = torch.tensor(slots, dtype=torch.int32)
        found.append(stack.step(embeddings[:, t].clone(), *turn, cache, places, lengths))
    torch.set_num_threads(before)
    return torch.stack(found, 1)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (3, 20), (18, 3)])
def test_steps_are_those_of_fp64(biases: bool, head_norms: bool, count: int, length: int) -> None:
    torch.manual_seed(2)
    model, embeddings = Model(biases, head_norms), torch.randn(count, length, HIDDEN)
    got = decode(model, embeddings, length, list(range(count)))
    expected = torch.stack([model.logits(x, *rotary(length)) for x in embeddings])
    assert float((got - expected).norm() / expected.norm()) <= 1e-6


def test_steps_in_bfloat16_are_those_of_fp64_within_its_rounding() -> None:
    torch.manual_seed(2)
    model, embeddings = Model(True, True), torch.randn(3, 20, HIDDEN)
    got = decode(model, embeddings, 20, [0, 1, 2], dtype=HALF)
    expected = torch.stack([model.logits(x, *rotary(20)) for x in embeddings])
    assert 1e-4 <= float((got - expected).norm() / expected.norm()) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_row_depends_neither_on_the_others_nor_on_its_place_nor_on_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model, embeddings = Model(True, True), torch.randn(19, 6, HIDDEN)
    together = decode(model, embeddings, 6, list(range(19)), dtype=dtype)
    assert torch.equal(decode(model, embeddings, 6, list(range(19)), threads=3, dtype=dtype), together)
    assert torch.equal(decode(model, embeddings[4:6], 40, [3, 1], dtype=dtype), together[4:6])


def test_rows_that_leave_do_not_change_the_others() -> None:
    torch.manual_seed(4)
    model, embeddings = Model(False, False), torch.randn(3, 2, HIDDEN)
    expected, stack, (cos, sin) = decode(model, embeddings, 2, [0, 1, 2]), model.stack(), rotary(2)
    cache, slots = Cache(2, 3, KEY_HEADS, COLUMNS, 2), torch.arange(3, dtype=torch.int32)
    turn = [x[0].expand(3, -1).contiguous() for x in (cos, sin)]
    stack.step(embeddings[:, 0].clone(), *turn, cache, slots, torch.zeros(3, dtype=torch.int32))
    kept = torch.tensor([2, 0])
    turn = [x[1].expand(2, -1).contiguous() for x in (cos, sin)]
    got = stack.step(embeddings[kept, 1].clone(), *turn, cache, slots[kept], torch.ones(2, dtype=torch.int32))
    assert torch.equal(got, expected[kept, 1])


def test_written_prompts_are_continued() -> None:
    cache = Cache(1, 2, 2, 16, 5)
    assert cache.keys.shape == (1, 2, 2, 16, 16)
    keys, values = torch.randn(2, 2, 3, 16)
    cache.write(0, slice(1, 2), keys, values)
    assert torch.equal(cache.keys[0, 1, :, :, :3], keys.transpose(1, 2))
    assert torch.equal(cache.values[0, 1, :, :3], values)


REFUSALS = {
    "a place twice": ({"slots": [0, 0]}, "slots must be different places of the cache"),
    "a place that does not exist": ({"slots": [0, 2]}, "slots must be different places of the cache"),
    "a full place": ({"lengths": [0, 16]}, "lengths must be below the capacity"),
    "a negative length": ({"lengths": [-1, 0]}, "lengths must be below the capacity"),
    "other embeddings": ({"hidden": HIDDEN + 16}, "x must be"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_a_step_cannot_read_is_refused(what: str) -> None:
    change, message = REFUSALS[what]
    cache = Cache(2, 2, KEY_HEADS, COLUMNS, 16)
    slots, lengths = (torch.tensor(change.get(name, [0, 1]), dtype=torch.int32) for name in ("slots", "lengths"))
    x, turn = torch.randn(2, change.get("hidden", HIDDEN)), [torch.ones(2, COLUMNS)] * 2
    with pytest.raises(ValueError, match=message):
        Model(False, False).stack().step(x, *turn, cache, slots, lengths)
