#!/usr/bin/env bash
# transformers: a decoder taken from an encoder-decoder family reports the encoder's number of layers, and its key-value
# cache is made by that number: with more layers in the decoder its default forward pass raises IndexError.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. BartForCausalLM, BlenderbotForCausalLM and MarianForCausalLM hold the decoder alone, of config.decoder_layers
# layers. config.num_hidden_layers is an alias of config.encoder_layers, and get_text_config(decoder=True) gives the same
# number, although config.is_decoder is true. DynamicCache(config=...), which forward and generate make where use_cache is
# true, the default, takes it:
#   4 encoder and 2 decoder layers   the cache has 4 layers, of which 2 stay empty; results are right
#   2 encoder and 4 decoder layers   forward, generate and a static cache raise "IndexError: list index out of range" at
#                                    the third layer; with use_cache=False the model runs
# Published checkpoints have such shapes: Blenderbot 3B has 2 and 24 layers, distilled BART 12 and 3 or 6.
#
# It meets whoever asks a config which layer is the middle one, how many bytes a cache takes, or how many adapters a
# model gets: count the states of a forward pass, or the layers themselves.
#
# Output seen (2026-11-29):
#   Bart 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
#   Bart 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
#   Blenderbot 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
#   Blenderbot 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
#   Marian 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
#   Marian 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 1 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/layers.py" <<'PYTHON'
import torch
import transformers

IDS = {"vocab_size": 50, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
SIZES = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
torch.manual_seed(0)
ids = torch.randint(5, 50, (1, 5))


def attempt(call):
    try:
        return call()
    except IndexError as error:
        return type(error).__name__


@torch.no_grad()
def describe(family, encoder, decoder):
    shape = getattr(transformers, f"{family}Config")
    config = shape(encoder_layers=encoder, decoder_layers=decoder, **SIZES, **HEADS, **IDS)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    said = {model.config.num_hidden_layers, model.config.get_text_config(decoder=True).num_hidden_layers}
    states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    cache = attempt(lambda: len(model(ids).past_key_values.layers))
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, use_cache=False, **options)
    cached = [
        attempt(lambda: torch.equal(plain, model.generate(ids, **options, **more)))
        for more in ({}, {"cache_implementation": "static"})
    ]
    kept = f"cache {cache}" if isinstance(cache, int) else f"forward: {cache}"
    generated = "as without a cache" if cached == [True, True] else " ".join(sorted({str(x) for x in cached}))
    layers = len(model.model.decoder.layers)
    print(
        f"{family} {encoder}+{decoder}: config says {' '.join(map(str, said))} layers, the model has {layers}; "
        f"hidden states {len(states)}; {kept}; generate: {generated}"
    )


for family in ("Bart", "Blenderbot", "Marian"):
    describe(family, 4, 2)
    describe(family, 2, 4)
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" transformers==5.23.0 numpy==2.3.5

"$folder/env/bin/python" "$folder/layers.py" > "$folder/seen" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'EXPECTED'
Bart 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
Bart 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
Blenderbot 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
Blenderbot 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
Marian 4+2: config says 4 layers, the model has 2; hidden states 3; cache 4; generate: as without a cache
Marian 2+4: config says 2 layers, the model has 4; hidden states 5; forward: IndexError; generate: IndexError
EXPECTED
diff "$folder/expected" "$folder/seen"
cat "$folder/seen"
