#!/usr/bin/env bash
# transformers: continuous batching of a Gemma 2 with eager attention samples from a model without its softcap.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. Gemma 2 bounds its attention scores by 50 tanh(score / 50) and is loaded with eager attention where
# FlashAttention is not there, since SDPA refuses a softcap. generate_batch then replaces "eager" by "paged|eager", one
# function for all families, which adds the mask to the scores and takes the softmax; `softcap` arrives among the
# keyword arguments and is dropped without a word. A tiny random Gemma 2, whose query weights are multiplied by 20, so
# that scores exceed 50, continues two prompts greedily. Its log-probabilities of the tokens that generate_batch chose
# are those of
#   config without a softcap   this model, to rounding: the control
#   config with the softcap    the same weights without a softcap, to rounding, and 0.13 away from the model itself; the
#                              tokens are not those of generate() either
#   the same, as initialised   this model within 0.001: the scores are small, and a test on a random model shows nothing
#
# It meets reinforcement learning that samples by continuous batching and learns by the model's forward pass: samples
# come from another policy than the one that is trained, so that the ratio of the first step is not one.
#
# Output seen (2026-11-30):
#   softcap None, largest score 61: log-probabilities are the model's; tokens as generate
#   softcap 50, largest score 61: log-probabilities are those without a softcap, off by 0.13; tokens differ from generate
#   softcap 50, largest score 3: log-probabilities are the model's; tokens as generate
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 1 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/softcap.py" <<'PYTHON'
import torch
from transformers import ContinuousBatchingConfig, Gemma2Config, Gemma2ForCausalLM, GenerationConfig

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "sliding_window": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}
PROMPTS = [list(range(3, 8)), list(range(3, 12))]
NEW = 8


def build(softcap, factor):
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, **HEADS, **IDS, attn_logit_softcapping=softcap, initializer_range=0.1)
    config._attn_implementation = "eager"
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
    return model


@torch.no_grad()
def largest_score(model):
    """Return the largest attention score of the first layer without positions, before any softcap."""
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    states = norm(model.model.embed_tokens(torch.tensor([PROMPTS[1]])))
    queries, keys = (
        project(states).unflatten(-1, (-1, HEADS["head_dim"])).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    keys = keys.repeat_interleave(HEADS["num_attention_heads"] // HEADS["num_key_value_heads"], 1)
    return (queries @ keys.mT * attention.scaling).abs().max().item()


@torch.no_grad()
def largest_gap(outputs, model):
    """Return the largest distance of the reported log-probabilities from those of one forward pass."""
    gaps = []
    for out in outputs:
        ids = torch.tensor([out.prompt_ids + out.generated_tokens])
        table = model(ids, use_cache=False).logits[0].log_softmax(-1)[len(out.prompt_ids) - 1 : -1]
        own = table.gather(1, torch.tensor(out.generated_tokens)[:, None])[:, 0]
        gaps.append((torch.tensor(out.logprobs) - own).abs().max().item())
    return max(gaps)


greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
small = ContinuousBatchingConfig(return_logprobs=True, num_blocks=64, max_batch_tokens=64)
for softcap, factor in ((None, 20), (50.0, 20), (50.0, 1)):
    outputs = build(softcap, factor).generate_batch(PROMPTS, greedy, small, warmup=False).values()
    model = build(softcap, factor)
    own, without = largest_gap(outputs, model), largest_gap(outputs, build(None, factor))
    generated = [model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :] for p in PROMPTS]
    same = [out.generated_tokens for out in outputs] == [tokens.tolist() for tokens in generated]
    said = "the model's" if own < 1e-3 else f"{own:.2f} away"
    if own >= 1e-3 and without < 1e-4:
        said = f"those without a softcap, off by {own:.2f}"
    name = softcap if softcap is None else f"{softcap:g}"
    tokens = "as" if same else "differ from"
    where = f"softcap {name}, largest score {largest_score(model):.0f}"
    print(f"{where}: log-probabilities are {said}; tokens {tokens} generate")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.23.0 numpy==2.3.5 psutil==7.1.3

"$folder/env/bin/python" "$folder/softcap.py" > "$folder/seen" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'EXPECTED'
softcap None, largest score 61: log-probabilities are the model's; tokens as generate
softcap 50, largest score 61: log-probabilities are those without a softcap, off by 0.13; tokens differ from generate
softcap 50, largest score 3: log-probabilities are the model's; tokens as generate
EXPECTED
diff "$folder/expected" "$folder/seen" || { cat "$folder/log"; exit 1; }
cat "$folder/seen"
