"""The varlen functions of every supported release, on their recorded signatures: called as they take it, and taken."""

import importlib.metadata
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from repo.attention.adapters import flash_kernel, torch_kernel
from repo.attention.candidates import CANDIDATES, first_that_agrees
from repo.attention.sdpa import WITHOUT_PLANS, per_run, without_plans
from repo.data.segments import make_segments
from tests.attention.signatures import FLASH, TORCH
from tests.support.packed_models import CPU

PLACES = {candidate.name: candidate.module for candidate in CANDIDATES}


def release():
    return ".".join(torch.__version__.split(".")[:2])


def choose(monkeypatch, softcap=False, window=True, **installed):
    """Choose among the candidates of which `installed` has the functions, by module with "__" for a dot."""
    for module in PLACES.values():
        parts = module.split(".")
        for i in range(len(parts)):
            if parts[0] != "torch":
                monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), None)  # an import fails: not installed
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    for module, function in installed.items():
        parts = module.split("__")
        for i in range(len(parts)):
            if parts[0] != "torch" and sys.modules[".".join(parts[: i + 1])] is None:
                folder = ModuleType(parts[i])
                folder.__path__ = []
                monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), folder)
        name = "varlen_attn" if parts[0] == "torch" else "flash_attn_varlen_func"
        monkeypatch.setitem(sys.modules, ".".join(parts), SimpleNamespace(**{name: function}))
    return first_that_agrees(CPU, torch.float32, 8, softcap, window)


@pytest.mark.parametrize("version", TORCH)
def test_varlen_attn_of_each_pytorch_is_taken(version, monkeypatch):
    chosen = choose(monkeypatch, window=version != "2.10", torch__nn__attention__varlen=TORCH[version])
    assert (chosen.name, chosen.traceable) == ("PyTorch varlen_attn", True)
    names = "FlashAttention 3 varlen", "FlashAttention 4 varlen", "FlashAttention 2 varlen"
    assert chosen.why == "; ".join(f"{name} is not installed" for name in names)


def test_pytorch_2_10_has_no_windows(monkeypatch):
    chosen = choose(monkeypatch, torch__nn__attention__varlen=TORCH["2.10"])
    assert chosen.kernel is per_run
    assert chosen.why.endswith(
        "varlen_attn fails: ValueError: window must be None for varlen_attn before torch 2.11; got 4"
    )


@pytest.mark.parametrize("version", TORCH)
def test_a_scale_of_its_own_reaches_varlen_attn(version):
    segments = make_segments(*torch.tensor([[5, 3], [0, 0], [0, 5]]))
    q, k, v = (torch.randn(n, h, 8, generator=torch.Generator().manual_seed(n)) for n, h in ((8, 4), (13, 2), (13, 2)))
    got = torch_kernel(TORCH[version])(q, k, v, segments, 0.7, None, None)
    torch.testing.assert_close(got, per_run(q, k, v, segments, 0.7, None, None))


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize(
    ("version", "module"), [("2", "flash_attn"), ("3", "flash_attn_interface"), ("4", "flash_attn__cute")]
)
def test_each_flash_attention_is_taken(version, module, softcap, monkeypatch):
    chosen = choose(monkeypatch, softcap, **{module: FLASH[version]})
    assert chosen.name == f"FlashAttention {version} varlen"
    assert not chosen.traceable


def test_a_flash_attn_folder_of_version_4_alone_is_not_version_2(monkeypatch):
    """The wheel of version 4 has flash_attn/cute/ and no flash_attn/__init__.py."""
    monkeypatch.setitem(FLASH, "4", lambda q, k, v, **_: 1 / 0)
    chosen = choose(monkeypatch, flash_attn__cute=FLASH["4"], torch__nn__attention__varlen=TORCH["2.14"])
    assert chosen.name == "PyTorch varlen_attn"
    assert "FlashAttention 4 varlen fails: ZeroDivisionError" in chosen.why
    assert "FlashAttention 2 varlen is not installed: flash_attn has no flash_attn_varlen_func" in chosen.why


def test_what_a_package_needs_besides_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import no_such_cutlass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    chosen = first_that_agrees(CPU, torch.float32, 8, False, True, CANDIDATES[1:3])
    assert chosen.refused == {
        "FlashAttention 4 varlen": "needs the package no_such_cutlass",
        "FlashAttention 2 varlen": "is not installed: flash_attn has no flash_attn_varlen_func",
    }
    for module in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(module, None)


@pytest.mark.skipif(release() not in TORCH, reason="no signature is recorded for this PyTorch")
def test_the_installed_pytorch_has_the_recorded_signature():
    from torch.nn.attention.varlen import varlen_attn

    assert list(inspect.signature(varlen_attn).parameters) == list(inspect.signature(TORCH[release()]).parameters)


@pytest.mark.parametrize(("package", "version"), [("flash-attn", "2"), ("flash-attn-4", "4")])
def test_an_installed_flash_attention_takes_what_the_adapter_gives(package, version):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    module = pytest.importorskip(PLACES[f"FlashAttention {version} varlen"])
    real, recorded = (inspect.signature(f).parameters for f in (module.flash_attn_varlen_func, FLASH[version]))
    given = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "softcap"}
    given |= {"window_size", "deterministic"}
    assert given <= set(recorded) & set(real)
    assert flash_kernel(module.flash_attn_varlen_func)


def test_sdpa_in_runs_does_not_plan_for_new_lengths():
    assert SDPBackend.CUDNN_ATTENTION not in WITHOUT_PLANS
    with without_plans(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
