#!/usr/bin/env bash
# Liger Kernel: logits whose first 2048 columns are -inf give a finite GRPO loss, and gradients that are all NaN.
#
# Versions: liger-kernel 0.8.5, triton 3.9.0 (interpreter), torch 2.13.0 (CPU), Linux x86-64, Python 3.11, from PyPI.
#
# Behaviour. A vocabulary of 5000 ids, of which the first `masked` are ruled out by -inf, as a grammar, a kept set of
# top-p or a mask of unused ids does; the targets are allowed. Against torch.log_softmax:
#   masked 0 or 2047   fused_selective_log_softmax agrees to 1e-5, all gradients of triton_grpo_loss are finite
#   masked 2048        every log-probability is NaN, and so is every gradient, of both tokens; the loss is -0.8
# The kernels walk over the vocabulary in blocks of 2048 with a running maximum that begins at -inf. A first block
# without a finite logit leaves it there, and exp(-inf - (-inf)) rescales the sum by NaN. One finite column in that
# block is enough to hide it, so that small test vocabularies never show it.
# The loss hides it as well: the ratio is NaN, but the clamp and the minimum of the clipped surrogate give the number
# instead of the NaN in the interpreter, so that a loss of -0.8 is logged (1 is right: ratio one, advantage one).
#
# It meets whoever masks the vocabulary before the loss. A check that the loss is finite does not see it; check the norm
# of the gradient. The remedy is one line: rescale by zero while the maximum is -inf, or begin it at a finite number.
#
# Output seen (2026-11-29):
#   masked 0: log-probabilities right, loss -1.000, gradients NaN 0 of 10000
#   masked 2047: log-probabilities right, loss -1.000, gradients NaN 0 of 10000
#   masked 2048: log-probabilities NaN 2 of 2, loss -0.800, gradients NaN 10000 of 10000
#   masked 4096: log-probabilities NaN 2 of 2, loss -0.800, gradients NaN 10000 of 10000
#
# Exits with 1 and a diff if any of that has changed. Takes a minute and 2 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/masked.py" <<'PYTHON'
import torch
from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax, triton_grpo_loss

ids = torch.tensor([[4500, 4800]])
for masked in (0, 2047, 2048, 4096):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 5000)
    logits[..., :masked] = -torch.inf
    right = logits[:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    found = fused_selective_log_softmax(logits, ids, 1.0)
    bad = int(found.isnan().sum())
    told = f"NaN {bad} of 2" if bad else "right" if bool((found - right).abs().max() < 1e-5) else "wrong"
    logits.requires_grad_()
    settings = {"temperature": 1.0, "beta": 0.0, "inplace": False, "reduce": True}
    loss, _ = triton_grpo_loss(logits, None, None, ids, torch.ones(1), **settings)
    loss.backward()
    read = logits.grad[:, :-1]  # the last position predicts nothing
    bad = int(read.isnan().sum())
    print(f"masked {masked}: log-probabilities {told}, loss {loss.item():.3f}, gradients NaN {bad} of {read.numel()}")
PYTHON

"$python" -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
"${pip[@]}" torch==2.13.0
"${pip[@]}" triton==3.9.0 numpy==2.3.5 liger-kernel==0.8.5 transformers==5.23.0

TRITON_INTERPRET=1 "$folder/env/bin/python" -W ignore "$folder/masked.py" > "$folder/seen" 2> "$folder/log" || {
  cat "$folder/log"
  exit 1
}
sed -n 's/^#   \(masked [0-9]*: .*\)/\1/p' "$0" | diff - "$folder/seen"
cat "$folder/seen"
