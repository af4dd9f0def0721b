"""What is written for vLLM is the policy: its logits, with adapters merged, under the names of its checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from repo.config.schema import ModelConfig
from repo.models.policy import Policy, load_policy
from repo.rollout.vllm.weights import WeightWriter, make_work_folder

IDS = torch.tensor([[5, 9, 40, 7, 300]])


def changed_policy(folder: Path, rank: int, dtype: str = "float32") -> Policy:
    """A policy after a step of training: each trained weight is a little off."""
    policy = load_policy(str(folder), torch.device("cpu"), True, ModelConfig(lora_rank=rank, dtype=dtype))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("rank", [0, 4])
def test_the_written_model_has_the_logits_of_the_policy(tiny_model, tmp_path, rank):
    policy = changed_policy(tiny_model, rank)
    WeightWriter(policy.model, torch.float32).write(tmp_path / "w", 3)
    assert json.loads((tmp_path / "w" / "step.json").read_text()) == {"step": 3}
    assert load_file(tmp_path / "w" / "model.safetensors").keys() == load_file(tiny_model / "model.safetensors").keys()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "w", dtype=torch.float32)
    with torch.no_grad():
        expected, got = policy.model(IDS).logits, written(IDS).logits
        start = AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - start).abs().max() > 0.1
    assert any("lora" in name for name, _ in policy.model.named_parameters()) == bool(rank)  # still to be trained


def test_sums_are_rounded_once(tiny_model, tmp_path):
    policy = changed_policy(tiny_model, 4, "bfloat16")
    WeightWriter(policy.model, torch.bfloat16).write(tmp_path / "w", 0)
    weight = load_file(tmp_path / "w" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    layer = policy.model.model.layers[1].mlp.up_proj
    a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
    assert torch.equal(weight, (layer.base_layer.weight.float() + 2 * (b @ a)).bfloat16())


def test_the_negated_model_shares_no_weight_with_the_policy(tiny_model, tmp_path):
    policy = changed_policy(tiny_model, 0)
    WeightWriter(policy.model, torch.float32).write(tmp_path / "w", None, negated=True)
    weights = load_file(tmp_path / "w" / "model.safetensors")
    assert all(torch.equal(w, -policy.model.get_parameter(name)) for name, w in weights.items())


def test_files_lie_in_memory_where_there_is_room():
    for size in (0, 2**60):
        folder = make_work_folder(size)
        assert folder.is_dir()
        assert not (size and folder.is_relative_to("/dev/shm"))
        folder.rmdir()
