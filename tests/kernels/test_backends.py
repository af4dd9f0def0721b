"""The backends against each other on random configurations, and how one is chosen."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repo_kernels import backends, linear_repo_loss, repo_loss, selective_log_softmax

from .cases import Batch, batches, loss_arguments, options

GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # two backends at their tolerance each


def available() -> list[str]:
    """The backends that this machine can run."""
    pytest.importorskip("triton", reason="triton is not installed")
    if not backends.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    return ["eager", "cpu", "triton"]


def distance(a: Tensor, b: Tensor, floor: float) -> float:
    """Relative L2 distance, of norms of at least `floor` per element."""
    assert a.isfinite().all()
    assert b.isfinite().all()
    size = max(b.double().norm().item(), floor * max(1, b.numel()) ** 0.5)
    return (a.double() - b.double()).norm().item() / size


@settings(max_examples=210, deadline=None, derandomize=True)
@given(batches(), options(), st.sampled_from(list(GRADIENT)), st.booleans())
def test_the_backends_agree_on_any_configuration(
    batch: Batch, chosen: dict[str, Any], dtype: torch.dtype, inplace: bool
) -> None:
    batch.ref_logits = batch.ref_logits.to(dtype)
    arguments = loss_arguments(batch, **chosen)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    results = {}
    for name in available():
        leaf = batch.logits.to(dtype).requires_grad_()
        out = repo_loss(leaf * 1, **arguments, grad_scale=scale, inplace=inplace, backend=name)
        out.loss.sum().backward()
        results[name] = out, leaf.grad
    for first, second in (("eager", "cpu"), ("eager", "triton"), ("cpu", "triton")):
        (a, grad_a), (b, grad_b) = results[first], results[second]
        assert distance(a.logps, b.logps, 0.1) <= 2e-6
        for x, y, tolerance in ((a.entropy, b.entropy, 2e-6), (a.kl, b.kl, 1e-5)):
            assert (x is None) == (y is None)
            assert x is None or distance(x, y, 0.1) <= tolerance
        assert distance(a.loss, b.loss, 0.1) <= 1e-5
        assert distance(a.stats.tensor, b.stats.tensor, 1.0) <= 1e-5
        assert distance(grad_a, grad_b, 1e-2 * scale / max(1, grad_b.numel())) <= GRADIENT[dtype]


def test_the_device_and_the_type_decide() -> None:
    if not backends.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.choose_backend(None, torch.zeros(1, 2, dtype=dtype)) == "cpu"
    assert backends.choose_backend(None, torch.zeros(1, 2, dtype=torch.float64)) == "eager"
    assert backends.choose_backend(None, torch.zeros(1, 2, device="meta")) == "eager"


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
        backends.choose_backend("cpu", torch.zeros(2, 3, device="meta"))


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
        "import sys, repo_kernels; print('triton' in sys.modules, 'repo_kernels.gpu' in sys.modules)",
        PYTHONPATH=":".join(sys.path),
    )
    assert found.strip() == "False False"


def test_without_the_extension_eager_serves_the_cpu_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load("cpu"), "available", lambda: False)
    backends._cpu_available.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert backends.default_backend(torch.zeros(1, 2)) == "eager"
        assert len(caught) == 1
        assert "without its C++ extension" in str(caught[0].message)
        with pytest.raises(ValueError, match="backend='cpu' needs the C\\+\\+ extension"):
            backends.choose_backend("cpu", torch.zeros(1, 2))
    finally:
        backends._cpu_available.cache_clear()


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
    """Triton compiles for types, specialised values and compile-time arguments; only the last two could vary here."""
    pytest.importorskip("triton", reason="triton is not installed")
    from repo_kernels.gpu import launch
    from repo_kernels.gpu.variants import variants

    for variant in variants():
        run_time = {name for name in variant.kernel.arg_names if name not in variant.constexprs}
        for option in ("do_not_specialize", "do_not_specialize_on_alignment"):
            assert run_time <= set(variant.kernel.kwargs[option]), variant.name

    compiled: set[tuple] = set()
    run = launch.launch

    def counted(variant: Any, count: int, *args: Any) -> None:
        types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in args)
        compiled.add((variant.name, types, tuple(variant.constexprs.items()), tuple(variant.options.items())))
        run(variant, count, *args)

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
    assert {name.split("-fp32")[0] for name, *_ in compiled} == {"fused-resident", "scale"}
    assert len(compiled) == 2
