"""A tiny chat model with a real BPE tokenizer, saved to disk as a user's own model would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

TEXT = [
    "The weather is fine today and the garden is green.",
    "Please tell me how to bake bread with flour, water and salt.",
    "A river flows from the mountain to the sea, slowly and quietly.",
    "I am sorry, I cannot help with that request.",
    "Numbers like 1 2 3 4 5 are easy; words are harder!",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
QUESTIONS = [
    "What is bread?",
    "How does a river flow to the sea?",
    "Tell me a word.",
    "Is the garden green today?",
    "Which numbers are easy, and which words are hard?",
    "Where is the mountain?",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on TEXT; pad differs from end of sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def save_tiny_model(folder: Path, seed: int = 0, heads: int = 4) -> Path:
    """A random two-layer Llama of 64 hidden units, with its tokenizer."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"intermediate_size": 96, "num_attention_heads": heads}
    return _save(folder, LlamaForCausalLM, seed, tie_word_embeddings=True, **sizes)


def save_tiny_classifier(folder: Path, seed: int = 3) -> Path:
    """A random one-label Llama classifier that shares the tokenizer of the tiny model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1}
    return _save(folder, LlamaForSequenceClassification, seed, intermediate_size=48, num_labels=1, **sizes)


def _save(folder: Path, architecture: type, seed: int, **config) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shared = {"vocab_size": len(tokenizer), "num_attention_heads": 4, "initializer_range": 0.2, **ids}
    architecture(LlamaConfig(**shared | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
