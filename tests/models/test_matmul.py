"""The choice of the type in which linear layers multiply on a CPU."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from repo.common.errors import UserError
from repo.config.schema import ModelConfig
from repo.models import matmul
from repo.models.matmul import Matmul, choose_matmul

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=300
    )
    return LlamaForCausalLM(shape).eval()


@pytest.fixture
def capable(monkeypatch):
    monkeypatch.setattr(matmul, "available", lambda: True)


@pytest.mark.usefixtures("capable")
def test_wide_fp32_models_multiply_in_bfloat16_and_the_difference_is_told(wide):
    chosen = choose_matmul(wide, ModelConfig(), CPU, True)
    assert chosen.half
    assert 0 < chosen.gap < 0.05
    assert f"within {chosen.gap:.3f} nats" in chosen.describe()
    assert choose_matmul(wide, ModelConfig(matmul_dtype="float32"), CPU, True) == Matmul()


@pytest.mark.usefixtures("capable")
@pytest.mark.parametrize(
    ("config", "why"),
    [(ModelConfig(shard=2), "model.shard is not 1"), (ModelConfig(compile=True), "model.compile is on")],
)
def test_what_prevents_it_is_told_and_an_explicit_wish_is_refused(wide, config, why):
    assert choose_matmul(wide, config, CPU, True).describe() == f"matrix products: float32 ({why})"
    with pytest.raises(UserError, match=f"model.matmul_dtype must be auto or float32 here, since {why}; got bfloat16"):
        choose_matmul(wide, dataclasses.replace(config, matmul_dtype="bfloat16"), CPU, True)


def test_a_cpu_without_the_instructions_multiplies_in_float32(wide, monkeypatch):
    monkeypatch.setattr(matmul, "available", lambda: False)
    assert "none of amx_bf16, avx512_bf16" in choose_matmul(wide, ModelConfig(), CPU, False).why
    with pytest.raises(UserError, match="none of amx_bf16, avx512_bf16"):
        choose_matmul(wide, ModelConfig(matmul_dtype="bfloat16"), CPU, False)


@pytest.mark.usefixtures("capable")
def test_a_model_that_bfloat16_moves_far_multiplies_in_float32(wide, monkeypatch):
    monkeypatch.setattr(matmul, "_gap", lambda model: 0.3)
    assert "changes log-probs by 0.3 nats" in choose_matmul(wide, ModelConfig(), CPU, True).why
    assert choose_matmul(wide, ModelConfig(matmul_dtype="bfloat16"), CPU, True).half
    monkeypatch.setattr(matmul, "_gap", lambda model: float("nan"))
    assert not choose_matmul(wide, ModelConfig(), CPU, True).half


@pytest.mark.usefixtures("capable")
def test_narrow_models_and_other_types_and_devices_are_left_alone(tiny_model):
    narrow = LlamaForCausalLM.from_pretrained(tiny_model)
    assert "below 256" in choose_matmul(narrow, ModelConfig(), CPU, True).why
    assert choose_matmul(narrow, ModelConfig(dtype="bfloat16"), CPU, True) is None
    assert choose_matmul(narrow, ModelConfig(), torch.device("cuda"), True) is None
