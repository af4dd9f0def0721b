#!/usr/bin/env bash
# TorchRL: in GRPOLoss the weight of the KL to the reference shrinks with the padding and the length of the prompt.
#
# Versions: torchrl 0.14.1, tensordict 0.14.3, torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. The policy's loss is a mean over the tokens that the mask keeps (the response's). The KL term that is added
# to it, loss_kl_to_ref, sets the other positions to 0 and takes the mean over all of them. The columns of
# ("tokens", "full") are padding, prompt and response, so that the KL is multiplied by the share of the response in
# the padded batch. Five tokens of a response, each with log pi_ref - log pi = -0.5, whose k3 estimate is 0.1065:
#   columns before the response   0        5        15
#   loss_objective                -1       -1       -1
#   loss_kl_to_ref                0.1065   0.0533   0.0266
# With a prompt of 500 tokens and answers of 100 a coefficient of 0.1 acts as one of 0.017, and as another in the next
# batch, whose longest prompt is another. kl_to_inference is formed by the same function. The logged `kl_to_ref` is as
# small, so that the curve looks like a policy that stays close to its reference.
#
# It meets whoever takes a coefficient from a paper or from another trainer, and whoever packs or buckets by length.
#
# Output seen (2026-11-30):
#   0 columns before the response: objective -1.0000, KL 0.1065, k3 0.1065
#   5 columns before the response: objective -1.0000, KL 0.0533, k3 0.1065
#   15 columns before the response: objective -1.0000, KL 0.0266, k3 0.1065
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 1 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/kl.py" <<'PYTHON'
import math

import torch
from tensordict import TensorDict
from torchrl.modules.distributions import LLMMaskedCategorical
from torchrl.objectives.llm import GRPOLoss

TOKENS, VOCABULARY, GAP = 5, 7, -0.5


class Actor(torch.nn.Module):
    """A policy whose logits are its parameters."""

    in_keys = [("tokens", "full")]

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def get_dist(self, tensordict, logits_key="logits"):
        return LLMMaskedCategorical(logits=self.logits, mask=tensordict["mask"])


def behind(columns, values, fill):
    """Put columns that are filled before values of shape (1, TOKENS, ...)."""
    return torch.cat([torch.full((1, columns, *values.shape[2:]), fill, dtype=values.dtype), values], 1)


torch.manual_seed(0)
logits = torch.randn(1, TOKENS, VOCABULARY)
tokens = torch.randint(0, VOCABULARY, (1, TOKENS))
own = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
for columns in (0, 5, 15):
    batch = {
        "tokens": {"full": behind(columns, tokens, -100)},
        "log_probs": {"full": behind(columns, own, 0.0)},
        "next": {"ref_log_probs": {"full": behind(columns, own + GAP, 0.0)}},
        "mask": behind(columns, torch.ones(1, TOKENS, dtype=torch.bool), False),
        "advantage": torch.ones(1, columns + TOKENS, 1),
    }
    loss = GRPOLoss(Actor(behind(columns, logits, 0.0)), entropy_bonus=False, kl_to_ref_coeff=1.0)
    out = loss(TensorDict(batch, [1]))
    objective, kl = out.loss_objective.item(), out.loss_kl_to_ref.item()
    k3 = math.expm1(GAP) - GAP
    print(f"{columns} columns before the response: objective {objective:.4f}, KL {kl:.4f}, k3 {k3:.4f}")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" torchrl==0.14.1 tensordict==0.14.3 hoptorch==0.1.4 numpy==2.3.5

"$folder/env/bin/python" "$folder/kl.py" > "$folder/seen" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'EXPECTED'
0 columns before the response: objective -1.0000, KL 0.1065, k3 0.1065
5 columns before the response: objective -1.0000, KL 0.0533, k3 0.1065
15 columns before the response: objective -1.0000, KL 0.0266, k3 0.1065
EXPECTED
diff "$folder/expected" "$folder/seen"
cat "$folder/seen"
