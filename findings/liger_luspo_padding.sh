#!/usr/bin/env bash
# Liger Kernel: both of its LUSPO losses depend on padding, each in its own way.
#
# Versions: liger-kernel 0.8.5, triton 3.9.0 (interpreter), torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. LUSPO weighs the loss of each response by its length (arXiv 2602.05261), against the length bias of a mean.
# Two responses of 2 and 6 tokens, masked behind their ends, with old and reference log-probabilities. A loss of them
# must not change if (a) other ids stand behind the end of the first, or (b) both are padded to 12 columns:
#   LigerFusedLinearGRPOLoss   sequence level without KL: neither changes it. Sequence level with a KL, and token level
#                              (the default) with or without: both do, (a) too, and the gradient reaches the hidden
#                              states behind the end. The loss is multiplied by the length, never by the mask.
#   triton_grpo_loss           (b) halves it, in all four: masked positions are zero but stay in the mean over columns,
#                              so that a response weighs length^2 / columns, not length.
# Where padding does not matter the first agrees with the formula of the paper; the second agrees with it only for
# batches without padding. TRL had the form of the first until August 2026 (pull request 6654); its repair has not
# reached either of these.
#
# It meets whoever takes loss_type="luspo" with a KL, or from Triton, on responses of unequal length: the longest of a
# batch decides how much the others count. Use sequence level and beta 0 with the fused loss, or TRL's own.
#
# Output seen (2026-11-29), the loss as given, after (a), after (b), and the gradient behind the end:
#   formula sequence, KL 0: 0.594 0.594 0.594
#   fused sequence, KL 0: 0.594 0.594 0.594, gradient zero
#   triton sequence, KL 0: 1.241 1.241 0.621
#   formula sequence, KL 0.04: 0.604 0.604 0.604
#   fused sequence, KL 0.04: 0.602 0.684 0.601, gradient not zero
#   triton sequence, KL 0.04: 1.249 1.249 0.624
#   formula token, KL 0: 0.595 0.595 0.595
#   fused token, KL 0: 0.610 0.567 0.590, gradient not zero
#   triton token, KL 0: 1.243 1.243 0.621
#   formula token, KL 0.04: 0.605 0.605 0.605
#   fused token, KL 0.04: 0.618 0.657 0.596, gradient not zero
#   triton token, KL 0.04: 1.250 1.250 0.625
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 2 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/luspo.py" <<'PYTHON'
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

RESPONSES, WIDTH, VOCABULARY = 2, 8, 32
torch.manual_seed(0)
hidden, weight = torch.randn(RESPONSES, 13, WIDTH), torch.randn(VOCABULARY, WIDTH)
ids, noise = torch.randint(VOCABULARY, (RESPONSES, 12)), torch.randn(2, RESPONSES, 12)
mask = (torch.arange(12) < torch.tensor([[2], [6]])).long()
advantages = torch.tensor([1.0, -0.5])
chosen = (hidden[:, :-1] @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
old, reference = chosen + 0.05 * noise[0], chosen + 0.3 * noise[1]
others = torch.where(mask.bool(), ids, (ids + 7) % VOCABULARY)


def formula(ids, columns, level, beta):
    mine = (hidden[:, :-1] @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    kept, difference = mask[:, :columns], (reference - mine)[:, :columns]
    ratio = (mine - old)[:, :columns]
    if level == "sequence":
        ratio = (ratio * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    ratio = ratio.exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    kl = difference.exp() - difference - 1
    return ((beta * kl - surrogate) * kept).sum(1).mean()


def fused(ids, columns, level, beta):
    states = hidden[:, :columns].clone().requires_grad_()
    loss = LigerFusedLinearGRPOLoss(
        beta=beta, loss_type="luspo", importance_sampling_level=level, compiled=False, use_ref_model=beta > 0
    )
    value, _ = loss(
        states, weight, ids[:, :columns], mask[:, :columns], advantages,
        ref_per_token_logps=reference[:, :columns] if beta else None, old_per_token_logps=old[:, :columns],
    )
    value.backward()
    fused.behind = "zero" if not states.grad[mask[:, :columns] == 0].any() else "not zero"
    return value


def triton(ids, columns, level, beta):
    logits = hidden[:, : columns + 1] @ weight.T
    parts = (old, reference if beta else None, ids, mask)
    old_part, reference_part, ids, kept = (p if p is None else p[:, :columns].contiguous() for p in parts)
    value, _ = triton_grpo_loss(
        logits, old_part, reference_part, ids, advantages, kept, temperature=1.0, beta=beta, eps_low=0.2, eps_high=0.2,
        inplace=False, loss_type="luspo", importance_sampling_level=level, reduce=True,
    )
    return value


for level in ("sequence", "token"):
    for beta in (0.0, 0.04):
        for loss in (formula, fused, triton):
            cases = ((ids, 6), (others, 6), (ids, 12))
            values = [f"{loss(*case, level, beta).item():.3f}" for case in cases]
            behind = f", gradient {fused.behind}" if loss is fused else ""
            print(f"{loss.__name__} {level}, KL {beta:g}: {' '.join(values)}{behind}")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" triton==3.9.0 numpy==2.3.5 liger-kernel==0.8.5 transformers==5.23.0

TRITON_INTERPRET=1 "$folder/env/bin/python" -W ignore "$folder/luspo.py" > "$folder/seen" 2> "$folder/log" || {
  cat "$folder/log"
  exit 1
}
sed -n 's/^#   \([a-z]* [a-z]*, KL .*\)/\1/p' "$0" | diff - "$folder/seen"
cat "$folder/seen"
