"""The score model: safe-rlhf's architecture, in a form that transformers' from_pretrained loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class ScoreModel(PreTrainedModel):
    """A causal LM's backbone with a linear layer `score_head` on the last token's state.

    It takes sequences of equal length, without padding. Source: PKU-Alignment/safe-rlhf, safe_rlhf/models/score_model.
    """

    _supports_sdpa = _supports_flash_attn = True
    _keys_to_ignore_on_load_missing = (r"score_head\.bias",)  # optional in checkpoints; 0 where it is missing

    def __init__(self, config: Any) -> None:
        """config: the backbone's config; its `score_dim` is the number of scores, by default 1."""
        super().__init__(config)
        backbone = AutoModel.from_config(config)
        self.base_model_prefix = backbone.base_model_prefix  # prefix of its weights' names in a checkpoint
        self.add_module(self.base_model_prefix, backbone)
        self.score_head = nn.Linear(config.get_text_config().hidden_size, getattr(config, "score_dim", 1))
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Compute logits (b, score_dim) of input_ids (b, length)."""
        states = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return SequenceClassifierOutput(logits=self.score_head(states[:, -1].to(self.score_head.weight.dtype)))

    @torch.no_grad()
    def fold_normalizer(self) -> None:
        """Fold the config's normaliser into the head, in fp32: (x - mean) / std for a reward, x / std for a cost."""
        config, head = self.config, self.score_head.float()
        kind = getattr(config, "score_type", "reward")
        if kind not in ("reward", "cost", "critic"):
            raise ValueError(f"score_type of the config must be reward, cost or critic; got {kind!r}")
        if kind == "critic" or not getattr(config, "do_normalize", False):
            return
        std = head.bias.new_tensor(getattr(config, "var", None) or [1.0]).sqrt() + 1e-8
        if kind == "reward":
            head.bias.sub_(head.bias.new_tensor(getattr(config, "mean", None) or [0.0]))
        head.bias.div_(std)
        head.weight.div_(std[:, None])


def format_conversation(messages: list[dict[str, str]], end: str) -> str:
    """Write a conversation in safe-rlhf's text format. end: text after each turn of the assistant, the EOS token."""
    forms = {"system": "{} ", "user": "USER: {} ", "assistant": "ASSISTANT:{}" + end}
    return "BEGINNING OF CONVERSATION: " + "".join(forms[m["role"]].format(m["content"]) for m in messages)
