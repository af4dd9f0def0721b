"""Score models of a few parameters on the disk, and the score of a text by the model itself."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from repo.config.schema import ScoringConfig
from repo.data.prompts import Prompt
from repo.scoring.scorers import load_scorers

TEXTS = ["What is bread?", "What is bread?", "Where is the mountain?", "Tell me a word."]
PROMPTS = [Prompt(text, text, "") for text in TEXTS]
RESPONSES = ["Flour, water and salt.", "", "By the sea, slowly.", "Harder words are words."]
TURNS = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bread"},
)
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
FUNCTIONS = "tests.support.scorers"
LENGTH_CHECK = {"prompt": "Say much.", "lower": "One two three.", "higher": "One."}


def make_scorer_tokenizer(template=None):
    """Not the policy's: other merges, other special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["BEGINNING OF CONVERSATION: USER: ASSISTANT: bread and water"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)


class ForScore(nn.Module):
    """What safe-rlhf saves: a backbone under its own name, and score_head."""

    def __init__(self, name, config, outputs, bias):
        super().__init__()
        self.name = name
        self.add_module(name, (LlamaModel if name == "model" else GPT2Model)(config))
        self.score_head = nn.Linear(32, outputs, bias=bias)

    def forward(self, ids):
        return self.score_head(getattr(self, self.name)(ids).last_hidden_state[0, -1])


def save_score_model(folder, backbone="llama", template=None, outputs=1, bias=True, form="safetensors", **config):
    """The model that was saved, in fp64."""
    tokenizer = make_scorer_tokenizer(template)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": None, "initializer_range": 0.2}
    torch.manual_seed(4)
    if backbone == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape, name, kind = LlamaConfig(**sizes, **ids), "model", "LlamaForScore"
    else:
        shape, name, kind = GPT2Config(n_embd=32, n_layer=2, n_head=4, **ids), "transformer", "GPT2ForScore"
    model = ForScore(name, shape, outputs, bias).eval()
    config = {"architectures": [kind], "score_dim": outputs, "bias": bias, "score_type": "reward", **config}
    (folder / "config.json").write_text(json.dumps({**shape.to_dict(), **config}))
    weights = model.state_dict()
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        files = {k: f"model-0000{1 + k.startswith('score')}-of-00002.safetensors" for k in weights}
        for file in set(files.values()):
            part = {k: v for k, v in weights.items() if files[k] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    tokenizer.save_pretrained(folder)
    return model.double()


def safe_rlhf_text(prompt, response):
    return f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}</s>"


@torch.no_grad()
def direct(model, texts):
    """(B, outputs) fp64 scores of whole texts, one forward each."""
    return torch.stack([model(torch.tensor([make_scorer_tokenizer()(text).input_ids])) for text in texts])


def close(found, expected):
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


def scoring(**fields):
    """Both signals from functions, but for the given fields."""
    return load_scorers(ScoringConfig(**{"reward": f"{FUNCTIONS}:words", "cost": f"{FUNCTIONS}:words", **fields}), None)
