"""Classifiers: sequence-classification models of transformers, and safe-rlhf's score models, as scorers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..common.adapter_folder import base_of
from ..common.config_fields import longest_input
from ..common.errors import UserError, first_line, require_package
from ..common.hub import require_model
from ..data.chat_format import ChatFormat
from ..data.prompts import Prompt
from ..data.token_ids import embedding_rows, plain_ids, require_embedded
from .adapter import errors_only, merge, outputs_of, saved_weights
from .manifest import read_manifest
from .score_model import ScoreModel, format_conversation
from .signals import field_of

BATCH_TOKENS = 4096  # tokens of one forward pass
CANNED = Prompt("canned", "How are you?", "")  # read at load, to see that the tokenizer fits the model
LONGEST = 20  # prompts, the longest ones, that are tried at the start


UNITS = {
    "logit": "raw output",
    "prob": "probability, 0 to 1",
    "logodds": "log-odds, 0 = as likely as not",
}
"""What a score is, by the unit in a scorer's name."""


class ClassifierScorer:
    """A scorer that reads one label of a sequence classifier, with the manifest's offset and scale.

    The score is the label's log-odds: its logit minus the log-sum-exp of the others', or its logit alone if the labels
    do not exclude one another. A model with one output, or a regression, gives its raw output.

    The model reads the conversation and the response in its tokenizer's chat template, or as a pair of texts if there
    is no template. Sequences of equal length are scored together without padding, because some models look for the
    last token by the pad id and would find another one in a padded batch.
    """

    kind, model_class = "classifier", AutoModelForSequenceClassification

    def __init__(self, name: str, signal: str, device: str, trust: bool = False, date: str | None = None) -> None:
        """Load the model, its tokenizer and its manifest. Raises UserError if that fails.

        name: `path`, `path#label` or `path#label:unit`, where path is a folder or hub name, or the folder of a LoRA
            adapter; the label is needed if there are several, and the unit is logodds, prob or logit.
        signal: "reward", "cost", "judge" or "shield", for messages. trust: run Python code that comes with the model.
        date: YYYY-MM-DD, today's date for a chat template that prints it; None: today.
        """
        path, _, output = name.partition("#")
        self.where, self.trust = f"{field_of(signal)} {name!r}", trust
        base = base_of(path, self.where)
        if base is not None:
            require_package("peft", f"{self.where}, a LoRA folder,")
        try:
            own = base is None or (Path(path) / "tokenizer_config.json").is_file()
            self.tokenizer = AutoTokenizer.from_pretrained(path if own else base, trust_remote_code=trust)
            self.model = self._load(path, base, device)
        except Exception as error:
            raise UserError(
                f"{field_of(signal)}: cannot load {path!r} as a {self.kind}: {first_line(error)}"
            ) from error
        self.model.to(device).eval().requires_grad_(False)
        self.manifest = read_manifest(Path(path), self.where)
        self.column, self.unit_name = self._choose(output)
        self.context = _context_of(self.model)
        self.chat = ChatFormat(self.tokenizer, date=date, whose=f"{self.where}: its")
        # transformers' classifiers refuse more than one sequence if the config has no pad id
        has_pad = self.model.config.get_text_config().pad_token_id is not None
        self.batches = has_pad or self.model_class is ScoreModel
        self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """Find out whether sequences of equal length get the same scores together as alone.

        Raises UserError if the tokenizer has ids beyond the model's embedding, or the model cannot be run.
        """
        ids = plain_ids(self.model, 2, 7, "classifier probe").to(self.model.device)
        require_embedded(self._encode(CANNED, "Yes.")["input_ids"], embedding_rows(self.model), self.where)
        try:
            alone = torch.cat([self.model(input_ids=row[None]).logits for row in ids]).float()
        except Exception as error:  # models raise errors of many types
            raise UserError(f"{self.where} cannot score a sequence of token ids: {first_line(error)}") from error
        if self.batches:
            together = self.model(input_ids=ids).logits.float()
            tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.05
            self.batches = bool((together - alone).abs().max() <= tolerance * alone.abs().max())

    def _choose(self, output: str) -> tuple[int, str]:
        """Return the column and the unit that a name's part after # means. Raises UserError if there are none such."""
        label, colon, unit = output.rpartition(":")
        if output in self.labels or not colon:
            label, unit = output, ""
        if not label and len(self.labels) == 1:
            label = self.labels[0]
        if label not in self.labels:
            known = ", ".join(sorted(self.labels))
            raise UserError(f"{self.where} must name one label as path#label; the model has {known}")
        is_value = self.excludes is None
        units = ("logit",) if is_value and len(self.labels) > 1 else tuple(UNITS)
        unit = unit or ("logit" if is_value else "logodds")
        if unit not in units:
            raise UserError(f"{self.where}: the unit after # and the label must be {' or '.join(units)}; got {unit!r}")
        return self.labels.index(label), unit

    @property
    def excludes(self) -> bool | None:
        """Return whether the labels exclude one another (a softmax), and None if the outputs are values."""
        kind = getattr(self.model.config, "problem_type", None)
        if kind == "regression" or len(self.labels) == 1:
            return None
        return kind != "multi_label_classification"

    @property
    def unit(self) -> str:
        """Describe what a score is before the manifest's offset and scale."""
        return f"{UNITS[self.unit_name]} of {self.labels[self.column]!r}"

    def _load(self, path: str, base: str | None, device: str) -> Any:
        """Load the weights, in fp32 on a CPU. Raises ValueError if the checkpoint lacks some of them.

        base: the model that an adapter in the folder `path` is to be merged into; None if it holds a model.
        """
        trust = {} if self.model_class is ScoreModel else {"trust_remote_code": self.trust}
        saved = {} if base is None else saved_weights(path)
        has_config = base is None or (Path(path) / "config.json").is_file()
        config = AutoConfig.from_pretrained(path if has_config else base, trust_remote_code=self.trust)
        if (outputs := outputs_of(saved)) not in (None, config.num_labels) and self.model_class is not ScoreModel:
            config.num_labels = outputs
        dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"  # "auto" keeps the saved dtype
        # transformers reports a head that the base lacks and the adapter brings; what nobody brings is refused below
        with errors_only() if saved else nullcontext():
            model, info = self.model_class.from_pretrained(
                base or path, config=config, dtype=dtype, output_loading_info=True, **trust
            )
        if missing := sorted(set(info["missing_keys"]) - saved.keys()):  # transformers would fill in random numbers
            raise ValueError(f"it lacks the weights {', '.join(missing[:3])}")
        return model if base is None else merge(model, path)

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

        Raises UserError unless the model is its trunk and one linear layer, and the score is linear in its outputs.
        """
        layers = [m for m in self.model.children() if m is not self.trunk and list(m.parameters())]
        if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or getattr(self.trunk, "pooler", None) is not None:
            raise UserError(f"{self.where} has more than a linear head on its last states, or none")
        weight, outputs = layers[0].weight, len(self.labels)
        bias = weight.new_zeros(outputs) if layers[0].bias is None else layers[0].bias
        direction = torch.nn.functional.one_hot(torch.tensor(self.column), outputs).to(weight)
        if self.unit_name == "logodds" and self.excludes:
            direction = 2 * direction - 1  # of two labels: the difference of their logits
        if self.unit_name == "prob" or (self.unit_name == "logodds" and self.excludes and outputs > 2):
            raise UserError(f"{self.where} is no linear function of its last states; name it path#label:logit")
        return direction @ weight / self.manifest.scale, self.manifest.apply(direction @ bias)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score B pairs; returns (B,) fp32 on the CPU. Raises UserError if a sequence exceeds the model's context."""
        encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, tokens in enumerate(encoded):
            by_length[len(tokens["input_ids"])].append(row)
        longest = max(by_length, default=0)
        if self.context and longest > self.context:
            took = f"a prompt and its response take {longest} tokens"
            raise UserError(f"{self.where}: {took}; its context is {self.context}")
        scores = torch.zeros(len(encoded))
        for length, rows in by_length.items():
            for part in torch.tensor(rows).split(self._batch_size(length)):
                inputs = {k: torch.tensor([encoded[row][k] for row in part.tolist()]) for k in encoded[0]}
                logits = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()}).logits
                scores[part] = self._read(logits.float()).cpu()
        return self.manifest.apply(scores)

    def _read(self, logits: Tensor) -> Tensor:
        """Return the scores (b,) in the chosen unit. logits: (b, outputs)."""
        chosen = logits[:, self.column]
        if self.excludes and self.unit_name != "logit":
            others = [column for column in range(logits.shape[1]) if column != self.column]
            chosen = chosen - logits[:, others].logsumexp(-1)
        return chosen.sigmoid() if self.unit_name == "prob" else chosen

    def check_prompts(self, prompts: Sequence[Prompt], response_tokens: int) -> str | None:
        """Check at the start that the model can read the longest prompts and one of each form.

        response_tokens: the most tokens of a response, by the policy's tokenizer. Returns a warning if a prompt and a
        response may exceed the context. Raises UserError if a prompt does, or if the chat template leaves out its text.
        """
        by_form = {tuple(turn["role"] for turn in p.conversation): p for p in prompts}
        longest = sorted(prompts, key=lambda p: len(p.text))[-LONGEST:]
        for prompt in (*by_form.values(), *longest):
            if self.tokenizer.chat_template is not None:
                messages = [*prompt.conversation, {"role": "assistant", "content": "Yes."}]
                self.chat.render_whole(messages, prompt.name)
        most = max((len(self._encode(p, "")["input_ids"]) for p in longest), default=0)
        if not self.context or most + response_tokens <= self.context:
            return None
        if most > self.context:
            raise UserError(f"{self.where}: a prompt takes {most} tokens; its context is {self.context}")
        return (
            f"{self.where} reads at most {self.context} tokens; the longest prompt takes {most}, so a response of "
            f"{response_tokens} (rollout.max_response_tokens) may not fit, which would stop the run"
        )

    def _batch_size(self, length: int) -> int:
        """Return how many sequences of `length` tokens one forward pass takes."""
        return max(1, BATCH_TOKENS // length) if self.batches else 1

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """Tokenise one pair into the model's inputs. Raises UserError if the chat template refuses it."""
        messages = [*prompt.conversation, {"role": "assistant", "content": response}]
        if self.tokenizer.chat_template is None:
            return dict(self.tokenizer(*self._plain(prompt, messages)))
        return self.chat.encode_turns(messages, prompt.name)

    def _plain(self, prompt: Prompt, messages: list[dict[str, str]]) -> tuple[str, ...]:
        """Return the texts that a tokenizer without a chat template gets. messages: end with the response."""
        return prompt.text, messages[-1]["content"]


class ScoreModelScorer(ClassifierScorer):
    """A scorer with a score model of safe-rlhf, normalised as its config says; path#index picks one of several scores.

    A tokenizer without a chat template gets safe-rlhf's text format of a conversation.
    """

    kind, model_class = "score model", ScoreModel

    def _load(self, path: str, base: str | None, device: str) -> Any:
        model = super()._load(path, base, device)
        model.fold_normalizer()
        return model

    excludes = None

    @property
    def labels(self) -> list[str]:
        """List the indices of the scores, as text."""
        return [str(i) for i in range(self.model.score_head.out_features)]

    def _plain(self, prompt: Prompt, messages: list[dict[str, str]]) -> tuple[str, ...]:
        return (format_conversation(messages, self.tokenizer.eos_token or ""),)


def _context_of(model: Any) -> int | None:
    """Return the most tokens that a model can read, None if it has no limit.

    The RoBERTa kind counts positions from the one after its padding index, and so reads fewer than its config says.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)  # of an nn.Embedding, or of I-BERT's own kind of embedding
        if name.endswith("position_embeddings") and padding is not None:
            return len(module.weight) - padding - 1
    return longest_input(model.config.get_text_config())


def load_model(name: str, signal: str, device: str, trust: bool = False, date: str | None = None) -> ClassifierScorer:
    """Load the scorer that fits the architecture in the model's config. Raises UserError if it cannot be loaded.

    name: folder or hub name, with #label if needed. signal: "reward", "cost", "judge" or "shield", for messages.
    trust: run Python code that comes with the model. date: today's date for chat templates, YYYY-MM-DD.
    """
    path = name.partition("#")[0]
    path = base_of(path, f"{field_of(signal)} {name!r}") or path
    none = "'none', " if signal == "judge" else ""
    takes = f"must be 'embedded', {none}a model (folder or hub name) or 'module:function'"
    require_model(path, f"{field_of(signal)} {takes}; got {name!r}")
    try:
        architectures = AutoConfig.from_pretrained(path, trust_remote_code=trust).architectures or ()
    except Exception as error:
        raise UserError(f"{field_of(signal)}: cannot load {path!r} as a model: {first_line(error)}") from error
    is_score_model = any(kind.endswith("ForScore") for kind in architectures)
    return (ScoreModelScorer if is_score_model else ClassifierScorer)(name, signal, device, trust, date)
