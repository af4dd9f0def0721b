"""Train by GRPOTrainer, RePOTrainer and RePOTrainer with a cost: each process of a test, started by torchrun.

    torchrun --nproc_per_node N -m tests.support.programs.trl_processes OUT MODEL

Each process writes to the folder OUT what it ended with, a file that torch.load reads.
"""

import os
import sys
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from repo_kernels.integrations.trl import RePOConfig
from tests.integrations.trl.trainers import RULE, SETTINGS, Recording, letters, questions


def train(trainer, config, model: str, out: Path, **more):
    """Train for three steps of two rows of each of two processes."""
    costs = {name: more.pop(name) for name in ("cost_funcs",) if name in more}
    settings = SETTINGS | {"per_device_train_batch_size": 2, "beta": 0.1, "ddp_backend": "gloo"} | more
    made = trainer(model, letters, config(str(out), **settings), questions(), **costs)
    made.train()
    found = {"loss": [entry["loss"] for entry in made.state.log_history if "loss" in entry]}
    found["weights"] = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    if costs:
        found |= {"lam": made.lam, "used": made.used, "batches": made.batches}
    return found


if __name__ == "__main__":
    out, model = Path(sys.argv[1]), sys.argv[2]
    ends = {
        "theirs": train(GRPOTrainer, GRPOConfig, model, out / "runs"),
        "ours": train(Recording, RePOConfig, model, out / "runs"),
        "with a cost": train(Recording, RePOConfig, model, out / "runs", **RULE),
    }
    torch.save(ends, out / os.environ["RANK"])
