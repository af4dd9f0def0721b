"""A checkpoint as a model in Hugging Face format."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import train
from repo.common.errors import UserError
from repo.export import run_command


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    more = ["--evaluation.prompts=0", "--save_every=1", "--keep=9", "--algorithm.advantages=gae"]
    train.run_command([*tiny_arguments, *more, f"--out={out}"])
    return out


def test_the_last_checkpoint_is_the_final_model(finished, tmp_path, capsys):
    run_command([str(finished), "--checkpoint=latest", f"--out={tmp_path / 'model'}"])
    assert str(tmp_path / "model") in capsys.readouterr().out
    a, b = (load_file(f / "model.safetensors") for f in (tmp_path / "model", finished / "final"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "4 steps" in (tmp_path / "model" / "README.md").read_text()


def test_the_newest_is_the_default_and_the_best_can_be_loaded(finished):
    best = (finished / "checkpoints" / "best").read_text()
    run_command([str(finished)])
    assert (finished / f"export-{(finished / 'checkpoints' / 'latest').read_text()}").is_dir()
    if best != (finished / "checkpoints" / "latest").read_text():
        run_command([str(finished), "--checkpoint=best"])
    folder = finished / f"export-{best}"
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(finished / "checkpoints" / best / "state.safetensors")
    assert torch.equal(model.model.norm.weight, saved["model.policy.model.norm.weight"])
    with pytest.raises(UserError, match="exists; choose another folder"):
        run_command([str(finished)])


def test_an_adapter_is_exported_as_one(tiny_arguments, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "run"
    train.run_command([*tiny_arguments, "--model.lora_rank=2", "--evaluation.prompts=0", "--steps=2", f"--out={out}"])
    run_command([str(out), "--checkpoint=step-000002", f"--out={tmp_path / 'adapter'}"])
    a, b = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", out / "final"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_what_is_not_there_or_not_intact_is_a_sentence(finished, tmp_path):
    with pytest.raises(UserError, match=r"has no 'step-000009'; it has step-000001, step-000002"):
        run_command([str(finished), "--checkpoint=step-000009"])
    with pytest.raises(UserError, match=r"has no '\.\./\.\./etc'"):
        run_command([str(finished), "--checkpoint=../../etc"])
    with pytest.raises(UserError, match="is not a run folder"):
        run_command([str(tmp_path)])
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "checkpoints" / "step-000002" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="step-000002 is not intact: state.safetensors has 1 bytes"):
        run_command([str(copy), "--checkpoint=step-000002"])
