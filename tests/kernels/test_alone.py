"""repo_kernels without the training loop: nothing but torch, numpy and Triton is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import repo
import repo_kernels

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
for name in ("jsonargparse", "transformers", "yaml", "rich", "safetensors", "repo"):
    sys.modules[name] = None  # an import of it fails
import torch
import repo_kernels
from repo_kernels.advantages import gae, group_advantages, rectified_advantages, token_signal
from repo_kernels.penalty import adapted_beta, lagrangian_lambda, repo_lambda
from repo_kernels.safety import is_safe, rectified_cost

costs, group = torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64)
advantages = rectified_advantages(
    group_advantages(costs, group), group_advantages(rectified_cost(costs, 0.0), group), costs, 2.0, "split"
)
assert advantages.tolist() == [2.0 - 2.0 * 1.0, -2.0] and is_safe(costs, 0.0).tolist() == [False, True]
assert repo_lambda(1.0, 0.5, 2.0, 10.0) == 2.0 and adapted_beta(1.0, 2.0, 1.0) == 1.02
print("alone")
"""


def test_losses_advantages_and_rules_need_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "alone\n", done.stderr


def test_the_training_loop_gives_the_same_functions() -> None:
    import repo.training.advantages
    import repo.training.multipliers
    from repo_kernels import advantages, penalty

    assert repo.training.advantages.gae is advantages.gae
    assert repo.training.multipliers.repo_lambda is penalty.repo_lambda


def test_the_version_is_that_of_the_package(monkeypatch) -> None:
    monkeypatch.setattr(repo_kernels, "version", {"repo-rlhf": "7.8"}.__getitem__)
    assert repo_kernels.__version__ == "7.8"
    monkeypatch.setattr("importlib.metadata.version", {"repo-rlhf": "7.9"}.__getitem__)
    assert repo.__version__ == "7.9"
    sources = [path.read_text() for folder in ("repo", "repo_kernels") for path in (ROOT / folder).rglob("*.py")]
    assert not any(re.search(r"^__version__ = ", text, re.MULTILINE) for text in sources)
