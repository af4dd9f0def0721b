"""What a policy says of responses, by the model's own padded forward and its own LM head."""

import torch
from torch import Tensor

from repo.data.sequences import Sequences
from repo.models.policy import Policy


def response_logits(policy: Policy, sequences: Sequences) -> Tensor:
    """(B, R, V), row t about response token t, differentiable."""
    width = sequences.response_ids.shape[1]
    with policy.running():
        out = policy.model(
            input_ids=sequences.input_ids[:, :-1],
            attention_mask=sequences.attention_mask[:, :-1].long(),
            position_ids=sequences.position_ids[:, :-1],
            use_cache=False,
        )
    return out.logits[:, -width:]


def response_logps(policy: Policy, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """(B, R) log-probabilities of the response tokens in fp32, or the model's fp64; 0 beyond each response."""
    logits = response_logits(policy, sequences)
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    found = logps.gather(-1, sequences.response_ids[..., None])[..., 0]
    return torch.where(sequences.response_mask, found, 0.0)
