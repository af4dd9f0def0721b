"""What the benchmarks compare is the same work: TRL's training and ours, and the FLOPs that a step is said to take."""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.bench_train_vs_trl import our_command, trl_job
from benchmarks.workloads.trainers import train_ours, train_trl
from benchmarks.workloads.training_step import useful_work
from repo.data.sequences import make_sequences
from repo.rollout import engine
from repo.rollout.sample import Rollout

STEPS = 4


@pytest.mark.slow
def test_trl_given_our_samples_trains_as_we_do(
    tiny_model: Path, tiny_prompts: tuple[Path, Path], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    options = argparse.Namespace(model=str(tiny_model), prompts=str(tiny_prompts[0]), lr=5e-3)
    command, rollouts, sample = our_command(options, STEPS, 0, tmp_path / "run"), list[Rollout](), engine.sample

    def recorded(*arguments) -> Rollout:
        rollouts.append(sample(*arguments))
        return rollouts[-1]

    with patch.object(engine, "sample", recorded):
        ours = train_ours(command, STEPS)
    rows = iter(rollout.sequences.token_lists() for rollout in rollouts)

    def replayed(_, prompt_ids, *__) -> tuple[list[list[int]], None]:
        step = next(rows)
        assert [list(ids) for ids in prompt_ids] == [prompt for prompt, _ in step]
        return [response for _, response in step], None

    with patch.object(trl.GRPOTrainer, "_generate_single_turn", replayed):
        theirs = train_trl(**trl_job(command), side="trl")
    assert theirs.reward == pytest.approx(ours.reward, rel=1e-5)
    assert theirs.tokens == ours.tokens
    assert ours.kl[-1] > 1e-3  # there is something to compare
    assert theirs.kl == pytest.approx(ours.kl, rel=1e-4, abs=1e-7)
    assert len(ours.seconds) == len(theirs.seconds) == STEPS - 1


def test_useful_work_is_what_a_forward_over_live_rows_multiplies(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompts, responses, group = [[5, 6, 7], [5, 6, 7], [8, 9]], [[5] * 4, [6] * 2, [7] * 3], torch.tensor([0, 0, 1])
    live, predicted = 3 + 3 + 1 + 2 + 2, 4 + 2 + 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.lm_head(model.base_model(torch.full((1, live), 5)).last_hidden_state[:, :predicted])
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    seen = [(3, 0), (3, 3), (1, 3), (2, 0), (2, 2)]  # new tokens, and the prompt before them
    pairs = sum(before + i + 1 for new, before in seen for i in range(new))
    work = useful_work(model, make_sequences(prompts, responses, 0, group))
    assert work.tokens == live
    assert work.flops == products + 2 * 2 * 2 * 64 * pairs  # scores and sums, in 2 layers of 64 units
