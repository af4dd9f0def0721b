"""Classifiers: sequence-classification models of transformers, and safe-rlhf's score models, as scorers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..common.errors import UserError, first_line
from ..common.hub import require_model
from ..data.prompts import Prompt
from .manifest import read_manifest
from .score_model import ScoreModel, format_conversation
from .signals import field_of

BATCH_TOKENS = 4096  # tokens of one forward pass


class ClassifierScorer:
    """A scorer that reads one label's logit of a sequence classifier, with the manifest's offset and scale.

    The model reads the conversation and the response in its tokenizer's chat template, or as a pair of texts if there
    is no template. Sequences of equal length are scored together without padding, because some models look for the
    last token by the pad id and would find another one in a padded batch.
    """

    kind, model_class = "classifier", AutoModelForSequenceClassification

    def __init__(self, name: str, signal: str, device: str, trust: bool = False) -> None:
        """Load the model, its tokenizer and its manifest. Raises UserError if that fails.

        name: `path` or `path#label`, where path is a folder or hub name; the label is needed if there are several.
        signal: "reward", "cost" or "judge", for messages. trust: run Python code that comes with the model.
        """
        path, _, label = name.partition("#")
        self.where, self.trust = f"{field_of(signal)} {name!r}", trust
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
            self.model = self._load(path, device)
        except Exception as error:
            raise UserError(
                f"{field_of(signal)}: cannot load {path!r} as a {self.kind}: {first_line(error)}"
            ) from error
        self.model.to(device).eval().requires_grad_(False)
        self.manifest = read_manifest(Path(path), self.where)
        if not label and len(self.labels) == 1:
            label = self.labels[0]
        if label not in self.labels:
            known = ", ".join(sorted(self.labels))
            raise UserError(f"{self.where} must name one label as path#label; the model has {known}")
        self.column = self.labels.index(label)

    def _load(self, path: str, device: str) -> Any:
        """Load the weights, in fp32 on a CPU. Raises ValueError if the checkpoint lacks some of them."""
        trust = {} if self.model_class is ScoreModel else {"trust_remote_code": self.trust}
        config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust)
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"  # "auto" keeps the saved dtype
        model, info = self.model_class.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **trust
        )
        if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
            raise ValueError(f"it lacks the weights {', '.join(missing[:3])}")
        return model

    @property
    def labels(self) -> list[str]:
        """List the names of the model's outputs, in order."""
        return [label for _, label in sorted(self.model.config.id2label.items())]

    @property
    def trunk(self) -> Any:
        """Return the base model, whose output has last_hidden_state."""
        return self.model.base_model

    def head(self) -> tuple[Tensor, Tensor]:
        """Return the weight (H,) and the bias () that map the trunk's last state to the score, manifest included.

        Raises UserError unless the model is its trunk and one linear layer.
        """
        layers = [m for m in self.model.children() if m is not self.trunk and list(m.parameters())]
        if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or getattr(self.trunk, "pooler", None) is not None:
            raise UserError(f"{self.where} has more than a linear head on its last states, or none")
        weight = layers[0].weight[self.column]
        bias = weight.new_zeros(()) if layers[0].bias is None else layers[0].bias[self.column]
        return weight / self.manifest.scale, self.manifest.apply(bias)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score B pairs; returns (B,) fp32 on the CPU. Raises UserError if a sequence exceeds the model's context."""
        encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, tokens in enumerate(encoded):
            by_length[len(tokens["input_ids"])].append(row)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(by_length, default=0)
        if context and longest > context:
            raise UserError(f"{self.where}: a prompt and its response take {longest} tokens; its context is {context}")
        scores = torch.zeros(len(encoded))
        for length, rows in by_length.items():
            for part in torch.tensor(rows).split(self._batch_size(length)):
                inputs = {k: torch.tensor([encoded[row][k] for row in part.tolist()]) for k in encoded[0]}
                logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits
                scores[part] = logits[:, self.column].float().cpu()
        return self.manifest.apply(scores)

    def _batch_size(self, length: int) -> int:
        """Return how many sequences of `length` tokens one forward pass takes."""
        # transformers' classifiers refuse more than one sequence if the config has no pad id
        padded = self.model.config.get_text_config().pad_token_id is not None
        return max(1, BATCH_TOKENS // length) if padded else 1

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """Tokenise one pair into the model's inputs. Raises UserError if the chat template refuses it."""
        messages = [*prompt.conversation, {"role": "assistant", "content": response}]
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(*self._plain(prompt, messages)))
        try:
            return dict(self.tokenizer.apply_chat_template(messages, return_dict=True))
        except Exception as error:  # a template may raise any type, e.g. for a system message
            raise UserError(f"{self.where}: its chat template refuses a prompt: {first_line(error)}") from error

    def _plain(self, prompt: Prompt, messages: list[dict[str, str]]) -> tuple[str, ...]:
        """Return the texts that a tokenizer without a chat template gets. messages: end with the response."""
        return prompt.text, messages[-1]["content"]


class ScoreModelScorer(ClassifierScorer):
    """A scorer with a score model of safe-rlhf, normalised as its config says; path#index picks one of several scores.

    A tokenizer without a chat template gets safe-rlhf's text format of a conversation.
    """

    kind, model_class = "score model", ScoreModel

    def _load(self, path: str, device: str) -> Any:
        model = super()._load(path, device)
        model.fold_normalizer()
        return model

    @property
    def labels(self) -> list[str]:
        """List the indices of the scores, as text."""
        return [str(i) for i in range(self.model.score_head.out_features)]

    def _batch_size(self, length: int) -> int:
        return max(1, BATCH_TOKENS // length)

    def _plain(self, prompt: Prompt, messages: list[dict[str, str]]) -> tuple[str, ...]:
        return (format_conversation(messages, self.tokenizer.eos_token or ""),)


def load_model(name: str, signal: str, device: str, trust: bool = False) -> ClassifierScorer:
    """Load the scorer that fits the architecture in the model's config. Raises UserError if it cannot be loaded.

    name: folder or hub name, with #label if needed. signal: "reward", "cost" or "judge", for messages.
    trust: run Python code that comes with the model.
    """
    path = name.partition("#")[0]
    takes = "must be 'embedded', a model (folder or hub name) or 'module:function'"
    require_model(path, f"{field_of(signal)} {takes}; got {name!r}")
    try:
        architectures = AutoConfig.from_pretrained(path, trust_remote_code=trust).architectures or ()
    except Exception as error:
        raise UserError(f"{field_of(signal)}: cannot load {path!r} as a model: {first_line(error)}") from error
    is_score_model = any(kind.endswith("ForScore") for kind in architectures)
    return (ScoreModelScorer if is_score_model else ClassifierScorer)(name, signal, device, trust)
