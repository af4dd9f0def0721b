#!/usr/bin/env bash
# transformers: in float64, eager attention turns every logit of a left-padded row into NaN, and is only fp32-accurate.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. A tiny random Llama of two layers reads two rows of six tokens; the first two of row 0 are padding, as in
# every rollout batch of prompts of unequal length. Logits of row 0 and of row 1, in which nothing is padded:
#   float32, eager and SDPA; float64, SDPA   finite
#   float64, eager                           NaN at all six positions of row 0, the four live ones too; row 1 is finite
# The mask is filled with the most negative number of the hidden states' dtype, and eager attention takes its softmax in
# float32, in which that number of float64 is -inf: a padded position, which may see padding alone, has no finite score
# and gets NaN. In the next layer 0 * NaN reaches the live positions. In float32 the number stays finite and the padded
# positions get a mean of nothing that nobody reads. The same softmax bounds what float64 is worth: without padding the
# logits of eager attention and of SDPA differ by more than 1e-12.
#
# It meets whoever checks a loss or a packing against a float64 copy of the model, the usual oracle of gradcheck: load
# that copy with attn_implementation="sdpa". Models without SDPA, such as Gemma 2 in this release, cannot be left-padded in
# float64 at all. Right padding has no row without a live key and stays finite.
#
# Output seen (2026-11-29):
#   float32 sdpa padded: finite
#   float32 eager padded: finite
#   float64 sdpa padded: finite
#   float64 eager padded: NaN at 6 of 6 positions of the padded row, 0 of 6 of the other
#   float64 eager right-padded: finite
#   float64 eager and SDPA without padding agree to fp64: False, to fp32: True
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 1 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/padding.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model(dtype, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).to(dtype).eval()


torch.manual_seed(1)
ids = torch.randint(90, (2, 6))
whole, left, right = (torch.ones(2, 6, dtype=torch.long) for _ in range(3))
left[0, :2] = right[0, -2:] = 0


@torch.no_grad()
def logits(dtype, attention, mask):
    return model(dtype, attention)(input_ids=ids, attention_mask=mask).logits


def described(values):
    bad = values.isnan().any(-1).sum(1).tolist()
    return "finite" if not any(bad) else f"NaN at {bad[0]} of 6 positions of the padded row, {bad[1]} of 6 of the other"


for dtype in (torch.float32, torch.float64):
    for attention in ("sdpa", "eager"):
        print(f"{str(dtype)[6:]} {attention} padded: {described(logits(dtype, attention, left))}")
print(f"float64 eager right-padded: {described(logits(torch.float64, 'eager', right))}")
error = (logits(torch.float64, "eager", whole) - logits(torch.float64, "sdpa", whole)).abs().max()
print(f"float64 eager and SDPA without padding agree to fp64: {bool(error < 1e-12)}, to fp32: {bool(error < 1e-5)}")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.23.0 numpy==2.3.5

"$folder/env/bin/python" "$folder/padding.py" > "$folder/seen" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'EXPECTED'
float32 sdpa padded: finite
float32 eager padded: finite
float64 sdpa padded: finite
float64 eager padded: NaN at 6 of 6 positions of the padded row, 0 of 6 of the other
float64 eager right-padded: finite
float64 eager and SDPA without padding agree to fp64: False, to fp32: True
EXPECTED
diff "$folder/expected" "$folder/seen"
cat "$folder/seen"
