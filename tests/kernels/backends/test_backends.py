"""The backends against each other on random configurations, and how one is chosen."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from repo_kernels.backends import choice
from repo_kernels.backends.cpu.memory import Spare
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.cases import Batch, batches, loss_arguments, options, row_arguments
from tests.support.kernels.oracle import row_weights, sequences_of

GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # two backends at their tolerance each


def available() -> list[str]:
    """The backends that this machine can run."""
    pytest.importorskip("triton", reason="triton is not installed")
    if not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    return ["eager", "cpu", "triton"]


def distance(a: Tensor, b: Tensor, floor: float) -> float:
    """Relative L2 distance, of norms of at least `floor` per element."""
    assert a.isfinite().all()
    assert b.isfinite().all()
    size = max(b.double().norm().item(), floor * max(1, b.numel()) ** 0.5)
    return (a.double() - b.double()).norm().item() / size


def size_of_terms(batch: Batch, logits: Tensor, arguments: dict[str, Any]) -> float:
    """Sum |w l| + |w alpha H| over tokens: where terms cancel, the rounding of a loss is relative to this sum."""
    by_token = {"loss_agg_mode": "none", "divisor": None, "max_length": None}
    out = repo_loss(logits, **{**arguments, **by_token}, backend="eager")
    terms = out.loss.abs()
    if out.entropy is not None:
        terms = terms + abs(float(arguments.get("entropy_coef", 0.0))) * out.entropy.abs()
    if arguments["loss_agg_mode"] == "none":
        return terms.norm().item()
    sequences = sequences_of(batch.leading, batch.cu_seqlens)
    live = set((~batch.dead.reshape(-1)).nonzero().squeeze(1).tolist())
    weights = row_weights(
        arguments["loss_agg_mode"], sequences, live, arguments["divisor"], arguments.get("max_length")
    )
    return sum(weight * terms.reshape(-1)[row].item() for row, weight in weights.items())


CONFIGURATIONS = (batches(), options(), st.sampled_from(list(GRADIENT)), st.booleans())


def check_agreement(batch: Batch, chosen: dict[str, Any], dtype: torch.dtype, inplace: bool) -> None:
    """Loss, statistics, values by token and gradient of every backend, pairwise."""
    batch.ref_logits = batch.ref_logits.to(dtype)
    arguments = loss_arguments(batch, **chosen)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    results = {}
    for name in available():
        leaf = batch.logits.to(dtype).requires_grad_()
        out = repo_loss(leaf * 1, **arguments, grad_scale=scale, inplace=inplace, backend=name)
        out.loss.sum().backward()
        results[name] = out, leaf.grad
    if dtype == torch.float16:  # whose range some gradients leave, on every backend
        assume(not results["eager"][1].isinf().any())
    size = max(size_of_terms(batch, batch.logits.to(dtype), arguments), 0.1)
    for first, second in (("eager", "cpu"), ("eager", "triton"), ("cpu", "triton")):
        (a, grad_a), (b, grad_b) = results[first], results[second]
        assert distance(a.logps, b.logps, 0.1) <= 2e-6
        for x, y, tolerance in ((a.entropy, b.entropy, 2e-6), (a.kl, b.kl, 1e-5)):
            assert (x is None) == (y is None)
            assert x is None or distance(x, y, 0.1) <= tolerance
        assert (a.loss - b.loss).norm() <= 1e-5 * size
        assert distance(a.stats.tensor, b.stats.tensor, 1.0) <= 1e-5
        assert distance(grad_a, grad_b, 1e-2 * scale / max(1, grad_b.numel())) <= GRADIENT[dtype]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(*CONFIGURATIONS)
def test_the_backends_agree_on_any_configuration(
    batch: Batch, chosen: dict[str, Any], dtype: torch.dtype, inplace: bool
) -> None:
    check_agreement(batch, chosen, dtype, inplace)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(*CONFIGURATIONS)
def test_the_backends_agree_on_a_thousand_configurations(
    batch: Batch, chosen: dict[str, Any], dtype: torch.dtype, inplace: bool
) -> None:
    check_agreement(batch, chosen, dtype, inplace)


def test_the_device_and_the_type_decide() -> None:
    if not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choice.choose_backend(None, torch.zeros(1, 2, dtype=dtype)) == "cpu"
    assert choice.choose_backend(None, torch.zeros(1, 2, dtype=torch.float64)) == "eager"
    assert choice.choose_backend(None, torch.zeros(1, 2, device="meta")) == "eager"


@pytest.mark.parametrize("backend", [None, "cpu", "eager", "triton"])
def test_the_choice_is_made_in_a_whole_graph(backend: str | None) -> None:
    """The other tests of torch.compile replace the default; this one traces it."""
    available()
    logits, ids = torch.randn(3, 9), torch.tensor([0, 1, 2])

    def loss(z: Tensor) -> Tensor:
        out = repo_loss(z, ids, None, torch.ones(3), loss_agg_mode="none", backend=backend)
        return out.loss + selective_log_softmax(z, ids, backend=backend)

    torch._dynamo.reset()
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
    assert torch.equal(found, loss(logits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_change_the_results(dtype: torch.dtype) -> None:
    logits, ids = torch.randn(3, 9), torch.tensor([0, 1, 2])
    ones = torch.ones(3)
    for backend in available():
        expected = (
            repo_loss(logits, ids, None, ones, backend=backend),
            selective_log_softmax(logits, ids, backend=backend),
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            got = (
                repo_loss(logits, ids, None, ones, backend=backend),
                selective_log_softmax(logits, ids, backend=backend),
            )
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(got[0].logps, expected[0].logps)
        assert torch.equal(got[0].stats.tensor, expected[0].stats.tensor)
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("view", ["contiguous", "[:, :-1]", "transposed", "columns"])
def test_a_large_gradient_has_the_strides_that_its_fake_promises(view: str) -> None:
    base = torch.randn(4, 71, 10_001)
    logits = {
        "contiguous": base,
        "[:, :-1]": base[:, :-1],
        "transposed": base.transpose(0, 1),
        "columns": base[..., 3:],
    }[view]
    promised = gradient_buffer(logits)
    for name in available():
        for ids in (None, torch.zeros(logits.shape[:-1], dtype=torch.int64), torch.full(logits.shape[:-1], -100)):
            arguments = None if ids is None else row_arguments(ids, reward_advantages=torch.ones(ids.shape))
            gradient, zeroed = choice.load(name).new_gradient(logits, arguments)
            assert gradient.stride() == promised.stride()
            assert gradient.storage_offset() == promised.storage_offset()
            assert not zeroed or not gradient.any()


def test_the_memory_of_a_gradient_is_used_again_only_when_nobody_holds_it() -> None:
    spare = Spare()
    first = spare.take(1000)
    held = first[10:20].view(torch.int16)  # the storage lives as long as any view of it
    del first
    held.fill_(7)
    second = spare.take(1000)
    second.zero_()
    assert (held == 7).all()
    address = second.data_ptr()
    del second
    assert spare.take(500).data_ptr() == address


def test_two_threads_never_get_the_same_memory() -> None:
    spare, shared = Spare(), []
    barrier = threading.Barrier(2)
    taken: list[Tensor | None] = [None, None]

    def take(me: int) -> None:
        for _ in range(1500):
            barrier.wait()
            taken[me] = spare.take(64)
            barrier.wait()
            if me == 0 and taken[0].data_ptr() == taken[1].data_ptr():
                shared.append(True)
            barrier.wait()
            taken[me] = None

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=take, args=(me,)) for me in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not shared


def test_the_linear_forms_keep_their_precision_under_autocast() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 16, generator=generator), torch.randn(9, 16, generator=generator)
    ids = torch.arange(5)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_repo_loss(*leaves, ids, None, torch.ones(5)).loss
            loss = loss + linear_selective_log_softmax(*leaves, ids).sum()
            loss.backward()
        results.append((loss, *(x.grad for x in leaves)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("function", ["loss", "logps", "linear"])
def test_fp64_is_for_the_eager_backend_only(function: str, backend: str) -> None:
    logits, ids = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    call = {
        "loss": lambda: repo_loss(logits, ids, None, torch.zeros(2), backend=backend),
        "logps": lambda: selective_log_softmax(logits, ids, backend=backend),
        "linear": lambda: linear_repo_loss(logits, logits, ids, None, torch.zeros(2), backend=backend),
    }[function]
    with pytest.raises(TypeError, match=f"backend='{backend}' takes float32, bfloat16 or float16; got float64"):
        call()


def test_the_cpu_backend_names_a_device_that_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="backend='cpu' takes tensors on the CPU; got float32 .* on meta"):
        choice.choose_backend("cpu", torch.zeros(2, 3, device="meta"))


def run_python(code: str, **environment: str) -> str:
    """Standard output and error of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    return done.stdout + done.stderr


def test_triton_on_the_cpu_without_its_interpreter_is_refused_with_the_way_out() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    found = run_python(
        "import torch; from repo_kernels import selective_log_softmax as f\n"
        "f(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend='triton')",
        PYTHONPATH=":".join(sys.path),
    )
    assert "ValueError: backend='triton' takes tensors on a GPU, or on the CPU with TRITON_INTERPRET=1" in found


def test_importing_the_losses_imports_no_triton_and_compiles_nothing() -> None:
    found = run_python(
        "import sys, repo_kernels; print('triton' in sys.modules, 'repo_kernels.backends.triton' in sys.modules)",
        PYTHONPATH=":".join(sys.path),
    )
    assert found.strip() == "False False"


def test_without_the_extension_eager_serves_the_cpu_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "CPU_BUILT", False)
    choice._warn_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert choice.default_backend(torch.zeros(1, 2)) == "eager"
        assert len(caught) == 1
        assert "without its C++ extension" in str(caught[0].message)
        with pytest.raises(ValueError, match="backend='cpu' needs the C\\+\\+ extension"):
            choice.choose_backend("cpu", torch.zeros(1, 2))
    finally:
        choice._warn_once.cache_clear()


def test_an_id_outside_the_vocabulary_is_nan_in_triton_and_never_an_address() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    logits = torch.randn(3, 9, requires_grad=True)
    ids = torch.tensor([2, 1 << 40, 3])
    out = repo_loss(logits, ids, None, torch.ones(3), loss_agg_mode="none", backend="triton")
    out.loss[::2].sum().backward()
    assert out.logps.isnan().tolist() == [False, True, False]
    assert out.loss.isnan().tolist() == [False, True, False]
    good = repo_loss(logits[::2], ids[::2], None, torch.ones(2), loss_agg_mode="none", backend="eager")
    assert torch.allclose(out.logps[::2], good.logps, rtol=1e-6)


def test_case_11_one_compiled_kernel_serves_every_length_stride_and_scalar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for types and compile-time arguments (tests/benchmarks/test_compiled.py: for nothing else)."""
    pytest.importorskip("triton", reason="triton is not installed")
    from repo_kernels.backends.triton import launch

    compiled: set[tuple] = set()
    run = launch.launch

    def counted(variant: Any, device: torch.device, programs: int, *args: Any) -> None:
        types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in args)
        compiled.add((variant.name, types, tuple(variant.constexprs.items()), tuple(variant.options.items())))
        run(variant, device, programs, *args)

    monkeypatch.setattr(launch, "launch", counted)
    generator = torch.Generator().manual_seed(0)
    for call, (rows, length, vocabulary) in enumerate([(1, 1, 16), (1, 3, 17), (2, 2, 16), (3, 1, 1000), (1, 2, 33)]):
        base = torch.randn(rows, length + 1, vocabulary + call, generator=generator)
        logits = base[:, :length, call:].requires_grad_()
        ids = torch.zeros(rows, length, dtype=torch.int64)
        out = repo_loss(
            logits,
            ids,
            None if call == 0 else torch.full((rows, length), -3.0),
            torch.ones(rows),
            costs=torch.ones(rows),
            lam=0.5 + call,
            temperature=torch.tensor(1.0 + call),
            eps_low=0.1 * call,
            ref_logps=torch.zeros(rows, length),
            beta=0.1 * call,
            kl_estimator="k2" if call % 2 else "k3",
            loss_agg_mode="token-sum" if call % 2 else "seq-mean-token-mean",
            backend="triton",
        )
        out.loss.backward(torch.tensor(0.5))
    # the kernels over sequences have tiles for few long sequences and for many of one token
    assert Counter(name.split("-")[0] for name, *_ in compiled) == {"prepare": 2, "fused": 1, "reduce": 2, "scale": 1}
