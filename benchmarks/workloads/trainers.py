"""Run one of the trainings that bench_train_vs_trl compares, in a process of its own.

    python -m benchmarks.workloads.trainers ours|trl|trl-kept|repo-trl JOB

JOB is a JSON file with the arguments of both sides; the measurements are written beside it, as JOB.result.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness.memory import resident

PARTS = ("rollout", "reference", "score", "update")


def echo(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward ten times the share of a response's words that also occur in its prompt."""
    rewards = []
    for prompt, response in zip(prompts, responses, strict=True):
        asked, said = (re.findall(r"\w+", text.lower()) for text in (prompt, response))
        rewards.append(10 * sum(word in asked for word in said) / max(1, len(said)))
    return rewards


def no_cost(prompts: list[str], responses: list[str]) -> list[float]:
    """Return zero cost for every response."""
    return [0.0] * len(responses)


def echo_of_messages(prompts: list[Any], completions: list[Any], **_: object) -> list[float]:
    """Compute `echo` with the signature of a reward function of GRPOTrainer."""
    return echo([turns[-1]["content"] for turns in prompts], [turns[0]["content"] for turns in completions])


@dataclass
class Measured:
    """Measurements of one process; the lists have an entry per step.

    stamps: clock at the end of each step, in seconds. peak: largest number of bytes resident (on CUDA allocated) up to
    the end of the last step. kl, reward: means. tokens: of all responses. parts: seconds by name of the part.
    """

    stamps: list[float] = field(default_factory=list)
    peak: int = 0
    kl: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Return the seconds of every step but the first, which warms up."""
        return [b - a for a, b in itertools.pairwise(self.stamps)]

    def stamp(self) -> None:
        """Note the end of a step."""
        self.stamps.append(time.perf_counter())
        self.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


class EnoughError(Exception):
    """Raised after the last step, to end the run without a checkpoint."""


def train_ours(command: list[str], steps: int) -> Measured:
    """Run repo.train with these arguments up to the end of the last step."""
    from repo.runs.folder import Run
    from repo.train import run_command

    measured, write = Measured(parts={name: [] for name in PARTS}), Run.write

    def stamped(run: Run, step: int, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        write(run, step, record, samples)
        measured.stamp()
        for name, values in measured.parts.items():
            values.append(record[f"seconds_{name}"])
        measured.kl.append(record["kl"])
        measured.reward.append(record["reward_mean"])
        measured.tokens.append(record["response_tokens"])
        if step + 1 == steps:
            raise EnoughError

    with patch.object(Run, "write", stamped):
        try:
            run_command(command)
        except EnoughError:
            return measured
    raise AssertionError("repo.train ended before its last step")


def train_trl(model: str, prompts: list[dict[str, Any]], arguments: dict[str, Any], side: str) -> Measured:
    """Run a trainer of TRL with these arguments on prompts of messages and token_ids.

    side: "trl": GRPOTrainer; "trl-kept": GRPOTrainer, which keeps freed memory as our loop does; "repo-trl":
    RePOTrainer without a cost.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    trainer_class, config_class = GRPOTrainer, GRPOConfig
    if side == "repo-trl":
        from repo_kernels.integrations.trl import RePOConfig, RePOTrainer

        trainer_class, config_class = RePOTrainer, RePOConfig
    if side == "trl-kept":
        from repo.common.malloc import keep_freed_memory

        keep_freed_memory()
    measured, tokenizer = Measured(), AutoTokenizer.from_pretrained(model)
    turns = [prompt["messages"] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded == [prompt["token_ids"] for prompt in prompts], "the prompts of the two sides differ"

    class Record(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            measured.stamp()

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "kl" in logs:  # the summary at the end of the run has no KL
                measured.kl.append(logs["kl"])
                measured.reward.append(logs[f"rewards/{echo_of_messages.__name__}/mean"])
                rows = arguments["per_device_train_batch_size"]
                measured.tokens.append(rows * logs["completions/mean_length"])

    trainer = trainer_class(
        model=model,
        args=config_class(**arguments),
        reward_funcs=[echo_of_messages],
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in turns]),
        processing_class=tokenizer,
        callbacks=[Record()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return measured


def work(side: str, job: Path) -> None:
    """Run one training in this process: read the job's file and write the result beside it."""
    content = json.loads(job.read_text())
    if side == "ours":
        measured = train_ours(content["command"], content["steps"])
    else:
        measured = train_trl(**content["trl"], side=side)
    job.with_suffix(".result").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
