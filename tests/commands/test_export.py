"""A checkpoint as a model in Hugging Face format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import train
from repo.common.errors import UserError
from repo.export import run_command
from repo.rollout.sample import sample
from repo.training.cost_gradient import cost_gradient


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


def weights_of(folder, name="model.safetensors"):
    """The weights of an exported folder, in fp64."""
    return {key: value.double() for key, value in load_file(folder / name).items()}


def test_scale_1_is_the_plain_export_bit_for_bit(finished, tmp_path):
    run_command([str(finished), f"--out={tmp_path / 'plain'}"])
    run_command([str(finished), "--scale=1", f"--out={tmp_path / 'scaled'}"])
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "scaled" / name).read_bytes()


def test_a_scaled_export_lies_on_the_line_through_reference_and_policy(finished, tiny_model, tmp_path, capsys):
    run_command([str(finished), f"--out={tmp_path / 'plain'}"])
    reference, policy = weights_of(tiny_model), weights_of(tmp_path / "plain")
    assert reference.keys() == policy.keys()
    assert any(not torch.equal(reference[name], policy[name]) for name in policy)
    for scale in (0.5, 1.25):
        run_command([str(finished), f"--scale={scale}"])
        folder = finished / f"export-step-000004-scale-{scale}"
        for name, value in weights_of(folder).items():
            expected = reference[name] + scale * (policy[name] - reference[name])
            assert torch.equal(value, expected.float().double()), name
            if scale == 0.5:
                assert torch.allclose(value, (reference[name] + policy[name]) / 2, rtol=0, atol=1e-7)
        assert f"θ_ref + {scale:g} (θ − θ_ref)" in (folder / "README.md").read_text()
        assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scaled_adapter_is_the_base_plus_the_scaled_product(tiny_arguments, tiny_model, tmp_path, dtype):
    pytest.importorskip("peft")
    out, scale = tmp_path / "run", 0.75
    more = ["--model.lora_rank=2", f"--model.dtype={dtype}", "--evaluation.prompts=0", "--steps=2"]
    train.run_command([*tiny_arguments, *more, "--optimizer.lr=1e-2", f"--out={out}"])
    run_command([str(out), f"--scale={scale}", "--merge", f"--out={tmp_path / 'merged'}"])
    run_command([str(out), f"--scale={scale}", f"--out={tmp_path / 'adapter'}"])
    base = {
        name: value.to(getattr(torch, dtype)) for name, value in load_file(tiny_model / "model.safetensors").items()
    }
    trained = weights_of(out / "final", "adapter_model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" not in trained:
            assert torch.equal(merged[name], weight)
            continue
        product = 2 * trained[f"{key}B.weight"] @ trained[f"{key}A.weight"]  # lora_alpha is twice the rank
        expected = weight.double() + scale * product
        ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-23
        assert merged[name].dtype == weight.dtype
        # peft rounds the product to the base's dtype before it adds it
        assert torch.allclose(merged[name].double(), expected, rtol=ulp, atol=float(product.abs().max()) * ulp * 2)
        changed += int(not torch.equal(merged[name], weight))
    assert changed == 14
    for name, value in weights_of(tmp_path / "adapter", "adapter_model.safetensors").items():
        expected = trained[name] * (scale if ".lora_B." in name else 1)
        assert torch.equal(value, expected.float().double()), name


@pytest.mark.parametrize("rank", [0, 2])
def test_a_patch_adds_the_entries_that_matter_most_to_the_cost(tiny_arguments, tiny_model, tmp_path, monkeypatch, rank):
    pytest.importorskip("peft")
    from repo import setup

    out, gradients = tmp_path / "run", []

    def kept(*arguments):
        gradients.append(cost_gradient(*arguments))
        return gradients[-1]

    monkeypatch.setattr(setup, "cost_gradient", kept)
    more = [f"--model.lora_rank={rank}", "--evaluation.prompts=0", "--steps=2", "--optimizer.lr=1e-2"]
    train.run_command([*tiny_arguments, *more, f"--out={out}"])
    run_command([str(out), "--merge", f"--out={tmp_path / 'whole'}"])
    run_command([str(out), "--keep=0.1", "--scale=0.5"])
    reference, trained = weights_of(tiny_model), weights_of(tmp_path / "whole")
    patched = weights_of(out / "export-step-000002-scale-0.5-keep-0.1")
    assert patched.keys() == trained.keys()
    gradient = {name: value.double() for name, value in gradients[0].items()}
    assert gradient.keys() == patched.keys()
    importance = {name: ((trained[name] - reference[name]) * gradient[name]).abs() for name in patched}
    entries = torch.cat([value.flatten() for value in importance.values()])
    threshold = entries.sort(descending=True).values[round(0.1 * len(entries)) - 1]
    moved = 0
    for name, value in patched.items():
        half = (reference[name] + trained[name]) / 2
        sure, never = importance[name] > 1.001 * threshold, importance[name] < 0.999 * threshold
        assert torch.allclose(value[sure], half[sure], rtol=0, atol=1e-6), name
        assert torch.equal(value[never], reference[name][never]), name
        moved += int(sure.sum())
    assert 0.09 * len(entries) < moved <= 0.1 * len(entries)
    assert "only the share 0.1" in (out / "export-step-000002-scale-0.5-keep-0.1" / "README.md").read_text()


def test_a_patch_is_chosen_by_prompts_not_held_out(tiny_arguments, tiny_prompts, tmp_path, monkeypatch):
    from repo import setup

    both, asked = tmp_path / "both.jsonl", []
    both.write_text("".join(path.read_text() for path in tiny_prompts))

    def sampled(policy, prompts, *arguments):
        asked.extend(prompt.text for prompt in prompts)
        return sample(policy, prompts, *arguments)

    out, more = tmp_path / "run", ["--evaluation.prompts=9", "--evaluation.samples_per_prompt=1", "--steps=1"]
    train.run_command([*tiny_arguments, f"--data.train={both}", *more, f"--out={out}"])
    monkeypatch.setattr(setup, "sample", sampled)
    run_command([str(out), "--keep=0.1"])
    held_out = {json.loads(line)["prompt"] for line in tiny_prompts[1].read_text().splitlines()}
    assert asked
    assert held_out.isdisjoint(asked)


@pytest.mark.parametrize("keep", ["0", "1.1", "-0.5", "nan"])
def test_a_share_out_of_range_is_refused(finished, keep):
    with pytest.raises(UserError, match=r"--keep must be > 0 and <= 1; got "):
        run_command([str(finished), "--keep", keep])


@pytest.mark.parametrize("scale", ["0", "2", "-0.5", "nan", "inf", "1.5001"])
def test_a_scale_out_of_range_is_refused(finished, scale):
    with pytest.raises(UserError, match=r"--scale must be > 0 and <= 1\.5; got "):
        run_command([str(finished), "--scale", scale])


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
