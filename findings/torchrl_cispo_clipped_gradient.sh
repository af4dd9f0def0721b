#!/usr/bin/env bash
# TorchRL: CISPOLoss gives clipped tokens no gradient at all, which is what CISPO was made to avoid.
#
# Versions: torchrl 0.14.1, tensordict 0.14.3, torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. CISPO (MiniMax-M1, arXiv 2506.13585, equation 4) clips the importance weight, takes no gradient of it, and
# multiplies log pi: sg(clip(r)) A log pi. Every token keeps a gradient, and a clipped one keeps that of the bound.
# CISPOLoss returns clip(r) A, without log pi and with the gradient of r. Its value and its derivative inside the bounds
# are those of an importance-weighted mean, but clip has slope 0 outside, so that the gradient of a clipped token is 0.
# Five tokens with ratios 0.5, 1, 1.1, 1.5, 3, bounds 0.8 and 1.28; norm of the gradient by each token's logits:
#   formula of the paper     no token at 0, for both signs of the advantage
#   CISPOLoss                tokens 1, 4 and 5 at 0, for both signs
#   GRPOLoss (clipped min)   tokens 4 and 5 at 0 where A > 0, token 1 where A < 0
# So it drops more than PPO's surrogate does: also a token that has become too likely although its advantage is negative
# (ratio 3), and one that has become unlikely although its advantage is positive (0.5), which are the tokens to repair.
# On the first update after a rollout all ratios are 1 and nothing shows.
#
# It meets whoever compares an objective of TorchRL with the same name elsewhere: TRL and Liger detach the ratio.
#
# Output seen (2026-11-30):
#   A=+1 paper: 0.1203 0.1915 0.2121 0.2532 0.2893
#   A=+1 CISPOLoss: 0 0.1915 0.2121 0 0
#   A=+1 GRPOLoss: 0.0752 0.1915 0.2121 0 0
#   A=-1 paper: 0.1203 0.1915 0.2121 0.2532 0.2893
#   A=-1 CISPOLoss: 0 0.1915 0.2121 0 0
#   A=-1 GRPOLoss: 0 0.1915 0.2121 0.2967 0.6781
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 1 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/cispo.py" <<'PYTHON'
import torch
from tensordict import TensorDict
from torchrl.modules.distributions import LLMMaskedCategorical
from torchrl.objectives.llm import CISPOLoss, GRPOLoss

TOKENS, VOCABULARY, LOW, HIGH = 5, 7, 0.2, 0.28


class Actor(torch.nn.Module):
    """A policy whose logits are its parameters."""

    in_keys = [("tokens", "full")]

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    def get_dist(self, tensordict, logits_key="logits"):
        return LLMMaskedCategorical(logits=self.logits, mask=tensordict["mask"])


def log_prob(logits):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def show(gradient):
    return " ".join(f"{norm:.4f}" if norm > 1e-6 else "0" for norm in gradient.norm(dim=-1)[0].tolist())


torch.manual_seed(0)
logits = torch.randn(1, TOKENS, VOCABULARY)
tokens = torch.randint(0, VOCABULARY, (1, TOKENS))
ratios = torch.tensor([[0.5, 1.0, 1.1, 1.5, 3.0]])
old = log_prob(logits) - ratios.log()
for advantage in (1.0, -1.0):
    own = logits.clone().requires_grad_()
    weight = (log_prob(own) - old).exp().clamp(1 - LOW, 1 + HIGH).detach()
    (-weight * advantage * log_prob(own)).mean().backward()
    print(f"A={advantage:+g} paper: {show(own.grad)}")
    for kind in (CISPOLoss, GRPOLoss):
        actor = Actor(logits)
        batch = {"tokens": {"full": tokens}, "log_probs": {"full": old}}
        batch |= {"mask": torch.ones(1, TOKENS, dtype=torch.bool), "advantage": torch.full((1, TOKENS, 1), advantage)}
        loss = kind(actor, clip_epsilon=(LOW, HIGH), entropy_bonus=False)
        loss(TensorDict(batch, [1])).loss_objective.backward()
        print(f"A={advantage:+g} {kind.__name__}: {show(actor.logits.grad)}")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" torchrl==0.14.1 tensordict==0.14.3 hoptorch==0.1.4 numpy==2.3.5

"$folder/env/bin/python" "$folder/cispo.py" > "$folder/seen" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
cat > "$folder/expected" <<'EXPECTED'
A=+1 paper: 0.1203 0.1915 0.2121 0.2532 0.2893
A=+1 CISPOLoss: 0 0.1915 0.2121 0 0
A=+1 GRPOLoss: 0.0752 0.1915 0.2121 0 0
A=-1 paper: 0.1203 0.1915 0.2121 0.2532 0.2893
A=-1 CISPOLoss: 0 0.1915 0.2121 0 0
A=-1 GRPOLoss: 0 0.1915 0.2121 0.2967 0.6781
EXPECTED
diff "$folder/expected" "$folder/seen"
cat "$folder/seen"
