"""Files of prompts, and what they hold."""

import json

from repo.data.prompts import load_prompts
from tests.support.tiny import make_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is bread?"},
    {"role": "assistant", "content": "Food."},
    {"role": "user", "content": "And water?"},
]
ANSWER = {"role": "assistant", "content": "A river."}


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def load(tmp_path, *records, **options):
    return load_prompts(write(tmp_path / "prompts.jsonl", records), **options)


def without_template():
    plain = make_tokenizer()
    plain.chat_template = None
    return plain
