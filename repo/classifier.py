"""A sequence-classification model of transformers as a scorer: one of its logits is the reward or the cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .errors import UserError, first_line

BATCH_TOKENS = 4096


class ClassifierScorer:
    """`path` or `path#label` of an AutoModelForSequenceClassification; the label may be left out when there is one.

    It reads the conversation [user: prompt, assistant: response] in its tokenizer's chat template, or the texts as a
    pair where there is none. Sequences of one length are scored together, so that nothing is padded: models that look
    for the last token by the pad id then find the same one as for a single sequence.
    """

    def __init__(self, name: str, signal: str, device: str) -> None:
        path, _, label = name.partition("#")
        self.name = name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
        except Exception as error:
            raise UserError(f"scoring.{signal}: cannot load {path!r} as a classifier: {first_line(error)}") from error
        self.model.to(device).eval().requires_grad_(False)
        self.column = self._column(label, signal)

    def _column(self, label: str, signal: str) -> int:
        names = {str(v): int(k) for k, v in self.model.config.id2label.items()}
        if label in names:
            return names[label]
        if not label and len(names) == 1:
            return 0
        known = ", ".join(sorted(names))
        raise UserError(f"scoring.{signal} {self.name!r} must name one label as path#label; the model has {known}")

    def _encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(prompt, response))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return dict(self.tokenizer.apply_chat_template(messages, return_dict=True))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(B,) fp32 on the CPU: the label's logit."""
        encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, tokens in enumerate(encoded):
            by_length[len(tokens["input_ids"])].append(row)
        scores = torch.zeros(len(encoded))
        for length, rows in by_length.items():
            # without a pad id transformers takes one sequence at a time
            size = max(1, BATCH_TOKENS // length) if self.model.config.pad_token_id is not None else 1
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                scores[part] = self._logits([encoded[row] for row in part])
        return scores

    def _logits(self, encoded: list[dict[str, Any]]) -> Tensor:
        inputs = {k: torch.tensor([e[k] for e in encoded], device=self.model.device) for k in encoded[0]}
        return self.model(**inputs).logits[:, self.column].float().cpu()
