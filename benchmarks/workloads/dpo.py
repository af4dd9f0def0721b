"""How fast is a step of DPO, and how much memory does it take, beside TRL's DPOTrainer?

    python -m benchmarks.workloads.dpo                 # --pairs, --tokens, --steps, --rounds, --model

Both sides train all weights of the same model in fp32 on the same pairs in the same order, with the loss
-log sigmoid(beta delta), a frozen copy as the reference, AdamW, and no gradient checkpointing. Sides take turns, each
in a process of its own, whose first step warms up. Ours is `repo.train --algorithm.method cdpo` with lambda 0 and
rewards so far apart that the soft label is 1. Every response has exactly `tokens` tokens. A step of ours is timed
without the responses that every fifth step samples to move lambda, which DPOTrainer has not. The losses are printed:
those of both sides must agree.

Predicted for 8 pairs of 128 tokens behind prompts of 60: DPOTrainer reads 16 x 188 tokens, forward twice (the reference
too) and backward; ours 8 x (60 + 256), 0.84 of them. Neither forms the logits of more than a block of the 2048 response
tokens, but DPOTrainer forms them once more in the backward pass, which makes its head 5 products where ours has 4. With
the head a fifth of the operations that is 0.82 of the time, 1.2 x the speed, where both multiply equally fast. Of
memory both hold two models, gradients and two moments, 2.7 GB; activations are those of 2528 and of 3008 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.harness.machine import ROOT, machine
from benchmarks.harness.memory import resident
from benchmarks.workloads.trainers import EnoughError, no_cost  # noqa: F401  # the scorer is named on the command line

SIDES = ("ours", "trl")
BETA, LR, MARK = 0.1, 1e-5, "Yes"
GIB = 2.0**30


def marked(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward what begins with MARK so much more that the soft label of a pair is 1 in fp32."""
    return [50.0 if response.startswith(MARK) else -50.0 for response in responses]


@dataclass
class Measured:
    """Of one process: seconds and loss of each step, and the largest number of bytes resident."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0


def write_pairs(path: Path, model: str, count: int, tokens: int) -> list[dict[str, str]]:
    """Write pairs of responses of `tokens` tokens each, end of sequence included, as a user's file of pairs.

    Responses are words that the tokenizer has as one token, so that their text has a known length.
    """
    import random

    from transformers import AutoTokenizer

    tokenizer, draw = AutoTokenizer.from_pretrained(model), random.Random(0)
    words = sorted(w[1:] for w in tokenizer.get_vocab() if w[:1] == "Ġ" and w[1:].isascii() and w[1:].isalpha())
    rows = []
    for i in range(count):
        said = [" ".join([first, *draw.choices(words, k=tokens - 2)]) for first in (MARK, "No")]
        question = f"Question {i}: " + " ".join(draw.choices(words, k=12)) + "?"
        rows.append({"id": str(i), "prompt": question, "response_0": said[0], "response_1": said[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def our_command(options: argparse.Namespace, model: str, data: Path, out: Path) -> list[str]:
    """Return the arguments of repo.train."""
    settings = {
        "out": out,
        "steps": options.steps,
        "save_every": 0,
        "sample_every": 0,
        "model.path": model,
        "data.train": data,
        "rollout.prompts_per_step": options.pairs,
        "rollout.max_response_tokens": options.tokens,
        "scoring.reward": "benchmarks.workloads.dpo:marked",
        "scoring.cost": "benchmarks.workloads.dpo:no_cost",
        "algorithm.method": "cdpo",
        "algorithm.beta": BETA,
        "penalty.initial": 0,
        "penalty.lr": 0,
        "optimizer.lr": LR,
        "optimizer.warmup_steps": 0,
        "optimizer.micro_batch_tokens": options.micro_batch_tokens,
        "evaluation.prompts": 0,
    }
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def train_ours(job: dict[str, Any]) -> Measured:
    """Run repo.train up to the end of the last step."""
    from repo.runs.folder import Run
    from repo.train import run_command

    measured, write = Measured(), Run.write

    def stamped(run: Run, step: int, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        write(run, step, record, samples)
        parts = {k: v for k, v in record.items() if k.startswith("seconds_") and k != "seconds_rollout"}
        measured.seconds.append(sum(parts.values()))
        measured.losses.append(record["loss"])
        measured.peak = resident("VmHWM")
        if step + 1 == job["steps"]:
            raise EnoughError

    with patch.object(Run, "write", stamped):
        try:
            run_command(job["command"])
        except EnoughError:
            return measured
    raise AssertionError("repo.train ended before its last step")


def train_trl(job: dict[str, Any]) -> Measured:
    """Run DPOTrainer on texts that tokenise to what our side reads."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    measured, tokenizer = Measured(), AutoTokenizer.from_pretrained(job["model"])
    started: list[float] = []

    class Record(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            started.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            measured.seconds.append(time.perf_counter() - started[-1])
            measured.peak = resident("VmHWM")

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                measured.losses.append(float(logs["loss"]))

    arguments = {
        "output_dir": job["out"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["pairs"],
        "beta": BETA,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    trainer = DPOTrainer(
        model=job["model"],
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        callbacks=[Record()],
    )
    trainer.remove_callback(PrinterCallback)
    first = trainer.train_dataset[0]
    found = [first["prompt_ids"], first["chosen_ids"], first["rejected_ids"]]
    assert found == job["first"], "the tokens of the two sides differ"
    trainer.train()
    return measured


def make_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the data of both sides, and return what both need: TRL's rows are in the order that ours draws them in."""
    from rich.console import Console
    from transformers import AutoConfig, AutoTokenizer

    from repo.command import read_command
    from repo.data.prompts import batch_at
    from repo.data.sources import load_data
    from repo.setup import find_assets, model_path

    console = Console(quiet=True)
    data, out = folder / "pairs.jsonl", folder / "run"
    probe = read_command([f"--model.path={options.model}"], "")[1]
    path = model_path(probe, find_assets(probe, console))
    write_pairs(data, path, options.pairs * options.steps, options.tokens)
    command = our_command(options, options.model, data, out)
    config = read_command(command, "")[1]
    tokenizer, shape = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    prompts = load_data(config, None, tokenizer, (), shape, console)[0]
    drawn = [p for step in range(options.steps) for p in batch_at(prompts, step, options.pairs, config.seed)]
    rows = []
    for prompt in drawn:
        asked, *said = prompt.pair[0].prompt_ids, *(example.response_ids for example in prompt.pair)
        assert all(len(response) == options.tokens for response in said)
        # DPOTrainer appends the end of sequence itself
        chosen, rejected = (tokenizer.decode(response[:-1]) for response in said)
        rows.append({"prompt": tokenizer.decode(asked), "chosen": chosen, "rejected": rejected})
    first = [list(drawn[0].pair[0].prompt_ids), *(list(example.response_ids) for example in drawn[0].pair)]
    shared = {"steps": options.steps, "pairs": options.pairs, "model": path, "out": str(folder / "trl")}
    return {**shared, "command": command, "rows": rows, "first": first}


def measure(options: argparse.Namespace, side: str) -> Measured:
    """Run one side in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        job = Path(name) / "job.json"
        job.write_text(json.dumps(make_job(options, Path(name))))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.workloads.dpo", "--job", str(job), "--side", side],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        measured = Measured(**json.loads(job.with_suffix(".result").read_text()))
    losses = ", ".join(f"{x:.5f}" for x in measured.losses)
    seconds = statistics.median(measured.seconds[1:])
    print(f"{side}: {seconds:.2f} s a step, {measured.peak / GIB:.2f} GiB; losses {losses}", flush=True)
    return measured


def main() -> None:
    """Measure both sides in turn and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each response")
    parser.add_argument("--steps", type=int, default=4, help="steps of a process; the first one is not timed")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--model", default="embedded", help="folder of another model")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="of ours")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job.read_text())
        measured = train_ours(job) if options.side == "ours" else train_trl(job)
        options.job.with_suffix(".result").write_text(json.dumps(asdict(measured)))
        return
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, since the first step is not timed; got {options.steps}")
    print(machine())
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES if number % 2 else SIDES[::-1]:
            found[side].append(measure(options, side))
    for ours, trl in zip(found["ours"], found["trl"], strict=True):
        assert math.isclose(ours.losses[0], math.log(2), abs_tol=1e-5), "the first step's policy is the reference"
        speed = statistics.median(trl.seconds[1:]) / statistics.median(ours.seconds[1:])
        print(
            f"DPOTrainer / ours: time {speed:.3f}, peak {trl.peak / ours.peak:.3f}; ours / DPOTrainer: peak "
            f"{ours.peak / trl.peak:.3f}"
        )


if __name__ == "__main__":
    main()
