"""The loss of pairs with hard labels is the loss of TRL's DPOTrainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from repo_kernels.pairs import pair_loss


def trl_loss(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> float:
    """The loss of TRL's DPOTrainer for pairs (N, 2), the first chosen: one token a response has the whole log-prob."""

    def rows(values):  # chosen, then rejected
        return values.t().reshape(-1, 1)

    def model(**_):
        zeros = torch.zeros(logps.numel(), 1)
        return SimpleNamespace(log_probs=rows(logps), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=torch.clone, gather_for_metrics=torch.clone)
    itself = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        beta=beta,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = torch.tensor([[0, 1]]).expand(logps.numel(), 2)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref_logps[:, 0], "ref_rejected_logps": ref_logps[:, 1]}
    return DPOTrainer._compute_loss(itself, model, inputs, False).item()


def test_with_hard_labels_it_is_trls_dpo():
    draw = torch.Generator().manual_seed(0)
    logps, ref_logps = 20 * torch.randn(2, 9, 2, generator=draw, dtype=torch.float64)
    ours = pair_loss(logps - ref_logps, torch.ones(9), 0.1).losses.mean().item()
    assert ours == pytest.approx(trl_loss(logps, ref_logps, 0.1), rel=1e-12)
    swapped = pair_loss(logps - ref_logps, torch.zeros(9), 0.1).losses.mean().item()
    assert swapped == pytest.approx(trl_loss(logps.flip(1), ref_logps.flip(1), 0.1), rel=1e-12)
    assert swapped != pytest.approx(ours, rel=0.01)
