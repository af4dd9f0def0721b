"""A tiny random chat model and a few prompts, so that the examples need no download. A model of yours replaces both."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTIONS = [
    "How do I bake bread?",
    "Which way does a river flow?",
    "Name a green vegetable.",
    "When do cherries ripen?",
    "How many legs has a spider?",
    "What is the weather like?",
]


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of about 300 tokens with a chat template, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(QUESTIONS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path) -> Path:
    """Save a random two-layer Llama of 64 hidden units with its tokenizer, and return the folder."""
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_prompts(path: Path, questions: list[str]) -> Path:
    """Save prompts as JSON lines, and return the file."""
    lines = [json.dumps({"id": f"{path.stem}-{i}", "prompt": question}) for i, question in enumerate(questions)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(folder: Path) -> list[str]:
    """Save model and prompts in a folder, and return the options of repo.train that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        f"--model.path={save_model(folder / 'model')}",
        f"--data.train={save_prompts(folder / 'train.jsonl', QUESTIONS[:4])}",
        f"--data.eval={save_prompts(folder / 'eval.jsonl', QUESTIONS[4:])}",
    ]
