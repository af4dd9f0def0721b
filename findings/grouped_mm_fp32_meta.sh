#!/usr/bin/env bash
# Grouped products in fp32 run eagerly on a CPU, but not on "meta", not under FakeTensorMode and not compiled.
#
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, Linux x86-64, Python 3.11, seen on 2026-11-28.
#
# torch.nn.functional.grouped_mm takes fp32 matrices in a plain call on a CPU. Its shape function, which "meta" tensors,
# FakeTensorMode and torch.compile use, refuses everything but bfloat16. transformers computes the experts of mixture
# models by this function, so that such a model in fp32, which is what from_config builds by default, runs on a CPU and
# cannot be run on "meta" to count its memory or operations, nor be compiled as one graph. In bfloat16 all of it works.
#
# Seen:
#   plain call, fp32: (8, 32)
#   meta, fp32: RuntimeError: Expected inputs of BF16 type but got mat_a.dtype=torch.float32 and mat_b.dtype=torch.float32.
#   fake, fp32: the same
#   torch.compile(fullgraph=True, backend="eager"), fp32: TorchRuntimeError
#   Qwen3MoeForCausalLM, tiny, fp32: cpu (1, 8, 64); meta RuntimeError, the same words
#   meta, bf16: (8, 32); Qwen3MoeForCausalLM in bf16 on meta: (1, 8, 64)
#
# Exit status 0 if all of it is still so, 1 if something has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip="$folder/env/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" - 2> errors <<'PYTHON' || { tail -5 errors; exit 1; }
import sys

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import grouped_mm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

REFUSAL = "Expected inputs of BF16 type"
print("torch", torch.__version__, "transformers", transformers.__version__)


def outcome(function, *arguments, **options):
    try:
        return tuple(function(*arguments, **options).shape)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def product(a, b, ends):
    return grouped_mm(a, b, offs=ends)


def inputs(dtype, device="cpu"):
    ends = torch.tensor([3, 8], dtype=torch.int32)
    return torch.ones(8, 16, dtype=dtype).to(device), torch.ones(2, 16, 32, dtype=dtype).to(device), ends.to(device)


def fake():
    with FakeTensorMode():
        return product(*inputs(torch.float32))


config = Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
)


def model(dtype, device):
    with torch.device(device):
        made = Qwen3MoeForCausalLM(config).eval().to(dtype)
    return made(torch.zeros(1, 8, dtype=torch.int64, device=device)).logits


compiled = torch.compile(product, fullgraph=True, backend="eager")
found = {
    "plain call, fp32": outcome(product, *inputs(torch.float32)),
    "meta, fp32": outcome(product, *inputs(torch.float32, "meta")),
    "fake, fp32": outcome(fake),
    "compiled, fp32": outcome(compiled, *inputs(torch.float32)),
    "model, cpu, fp32": outcome(model, torch.float32, "cpu"),
    "model, meta, fp32": outcome(model, torch.float32, "meta"),
    "meta, bf16": outcome(product, *inputs(torch.bfloat16, "meta")),
    "model, meta, bf16": outcome(model, torch.bfloat16, "meta"),
}
for name, result in found.items():
    print(f"{name}: {result}")
refused = [name for name, result in found.items() if isinstance(result, str) and REFUSAL in result]
same = (
    found["plain call, fp32"] == found["meta, bf16"] == (8, 32)
    and found["model, cpu, fp32"] == found["model, meta, bf16"] == (1, 8, 64)
    and {"meta, fp32", "fake, fp32", "model, meta, fp32"} <= set(refused)
    and isinstance(found["compiled, fp32"], str)
)
sys.exit(0 if same else 1)
PYTHON
