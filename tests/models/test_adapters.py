"""Adapters: folders of them are merged on loading, new ones reach the layers that the documentation names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaForCausalLM, Qwen3MoeConfig

from benchmarks.families.tiny_config import tiny_config
from repo import evaluate, export, train
from repo.common.adapter_folder import base_of
from repo.common.errors import UserError
from repo.config.schema import ModelConfig
from repo.models.adapters import linear_layers
from repo.models.policy import load_policy
from repo.models.quantised import keep_unpacked
from tests.support.tiny import make_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """Folder of an adapter on the tiny model, without a tokenizer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder, **fields):
    trainable = bool(fields)
    return load_policy(str(folder), CPU, trainable, ModelConfig(**fields)).model(input_ids=IDS).logits


@torch.no_grad()
def adapted(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)(input_ids=IDS).logits


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 0}, {"lora_rank": 4}])
def test_an_adapter_folder_is_merged_into_its_base(adapter, tiny_model, fields):
    policy = load_policy(str(adapter), CPU, bool(fields), ModelConfig(**fields))
    expected = adapted(tiny_model, adapter)
    with torch.no_grad():
        assert torch.allclose(policy.model(input_ids=IDS).logits, expected, atol=1e-4)
        assert (logits(tiny_model) - expected).abs().max() > 0.01
    assert policy.merged == str(tiny_model)
    lora = any("lora_" in name for name, _ in policy.model.named_parameters())
    assert lora == bool(fields.get("lora_rank"))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_that_starts_from_an_adapter_keeps_the_whole_model(adapter, options, tmp_path, capsys, rank):
    out = tmp_path / "run"
    train.run_command([*options, f"--model.path={adapter}", f"--model.lora_rank={rank}", "--steps=1", f"--out={out}"])
    assert "is merged into its base" in capsys.readouterr().out
    assert base_of(str(out / "final"), "model.path") is None
    assert not any("lora_" in name for name in load_file(out / "final" / "model.safetensors"))
    target = export.export(out, "latest", None, False, merge=True)
    assert torch.allclose(logits(target), logits(out / "final"), atol=1e-5)
    assert (logits(target) - logits(adapter)).abs().max() > 0


def test_a_run_of_adapters_is_exported_as_one_model(tiny_model, options, tmp_path):
    out = tmp_path / "run"
    train.run_command([*options, "--model.lora_rank=4", "--steps=1", f"--out={out}"])
    assert base_of(str(out / "final"), "model.path") == str(tiny_model)
    target = export.export(out, "latest", None, False, merge=True)
    assert (target / "model.safetensors").is_file()
    assert torch.allclose(logits(target), logits(out / "final"), atol=1e-5)
    assert (logits(target) - logits(tiny_model)).abs().max() > 0


def test_the_dry_run_and_the_evaluation_take_an_adapter_folder(adapter, tiny_arguments, tmp_path):
    train.run_command([*tiny_arguments, f"--model.path={adapter}", "--dry-run", f"--out={tmp_path / 'run'}"])
    out = tmp_path / "evaluation.json"
    rest = [a for a in tiny_arguments if a.startswith(("--data.eval", "--scoring", "--evaluation"))]
    limits = ["--evaluation.prompts=2", "--rollout.max_response_tokens=4"]
    evaluate.run_command([str(adapter), *rest, *limits, f"--out={out}"])
    assert json.loads(out.read_text())["summary"]


def test_an_adapter_config_without_a_base_is_a_sentence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        base_of(str(tmp_path), "model.path")


def test_dense_layers_beside_fused_experts_get_adapters_and_routers_none(tmp_path):
    pytest.importorskip("peft")
    config = tiny_config("deepseek_v3", 380)
    assert isinstance(config, DeepseekV3Config)
    config.first_k_dense_replace = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU, True, ModelConfig(lora_rank=2))
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert any("layers.0.mlp.gate_proj.lora_A" in name for name in names)
    assert any("layers.1.mlp.shared_experts.down_proj.lora_A" in name for name in names)
    assert not any(".experts." in name or "mlp.gate." in name or "lm_head" in name for name in names)
    assert policy.saves_merged  # peft would read the names of the dense layers as those of experts


def test_routers_that_are_linear_layers_are_left_out():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", 380))
    assert isinstance(model.config, Qwen3MoeConfig)
    model.model.layers[0].mlp.gate = torch.nn.Linear(32, model.config.num_experts)
    names = linear_layers(model)
    assert "model.layers.0.self_attn.q_proj" in names
    assert not [name for name in names if "gate" in name.split(".") or name == "lm_head"]


@pytest.fixture(scope="module")
def quantised(tiny_model, tmp_path_factory):
    """Folder of the tiny model in 4 bits."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    assert bitsandbytes
    folder = tmp_path_factory.mktemp("quantised")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_quantised_weights_are_not_trained_themselves(quantised):
    with pytest.raises(
        UserError, match=r"quantised \(bitsandbytes\) and cannot be trained themselves; set model.lora_r"
    ):
        load_policy(str(quantised), CPU, True, ModelConfig())


def test_the_dry_run_refuses_to_train_quantised_weights(quantised, options, tmp_path):
    arguments = [*options, f"--model.path={quantised}", f"--out={tmp_path / 'run'}", "--dry-run"]
    with pytest.raises(UserError, match="cannot be trained themselves"):
        train.run_command(arguments)
    train.run_command([*arguments, "--model.lora_rank=2"])


def test_adapters_on_four_bit_weights_get_the_gradients_of_the_dequantised_model(quantised):
    policy = load_policy(str(quantised), CPU, True, ModelConfig(lora_rank=2))
    whole = load_policy(str(quantised), CPU, True, ModelConfig(lora_rank=2)).model
    import bitsandbytes as bnb
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in whole.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            dense.weight.copy_(weight.float())
            module.base_layer = dense
    gradients = []
    for model in (policy.model, whole):
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(p, 0.01)
        model(input_ids=IDS).logits.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_only_four_bit_layers_leave_eval_mode(tiny_model):
    model = load_policy(str(tiny_model), CPU, True).model
    keep_unpacked(model)
    assert not any(module.training for module in model.modules())
