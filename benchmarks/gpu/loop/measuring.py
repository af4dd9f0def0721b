"""Time the stages of a loop for each model; a model's case is on disk after each stage."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.loop.goals import (
    DECODE,
    FIRST,
    FIRST_DECODE,
    LEAVING,
    REFERENCE,
    REHEARSED,
    SHAPES,
    UPDATE,
    WHOLE,
)
from benchmarks.gpu.loop.models import Models, Shape, make_models, make_prompts
from benchmarks.gpu.measuring import provenance
from benchmarks.gpu.plan import Plan
from benchmarks.harness import results
from benchmarks.harness.cases import failure
from benchmarks.harness.launches import synchronize
from benchmarks.harness.machine import device
from benchmarks.harness.process import Deadline
from benchmarks.harness.results import LIMIT, OURS, Case, Row
from benchmarks.workloads.training_step import useful_work
from repo.data.sequences import Sequences, make_sequences
from repo.models.actor import Actor, Predictions, read_reference
from repo.models.memory import describe_memory
from repo.rollout.decoding import describe_decoding
from repo.rollout.sample import sample
from repo.scoring.scorers import Scores
from repo.training.batch import make_batch
from repo.training.update import Updater

NAME = "loop"
STEPS = 1000  # of the imaginary run, of which the updates are the middle
GIB = 2.0**30
LARGE_MEMORY = 120 * GIB  # a device with less recomputes activations of models with adapters
LARGEST = 8192  # side of the matrix product that is the limit


def measure(plan: Plan, folder: Path, deadline: Deadline) -> None:
    """Measure the models of a plan until the deadline, and write <folder>/gpu_loop.json."""
    done = []
    for name, shape in (REHEARSED if plan.rehearsal else SHAPES).items():
        if deadline.passed:
            print(f"no time for {name}", flush=True)
            continue
        Loop(plan, folder, name, shape, deadline).run()
        done.append(name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"measured {', '.join(done)}", flush=True)


@dataclass
class Loop:
    """The stages of one model. rows, notes: what was found so far."""

    plan: Plan
    folder: Path
    name: str
    shape: Shape
    deadline: Deadline
    rows: list[Row] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Make the models and run the stages in order; one that fails is a row with its reason, and ends the case."""
        self.recomputes = bool(self.shape.lora) and _device_memory() < LARGE_MEMORY
        draw = torch.Generator().manual_seed(0)
        stage = "making the models"
        try:
            models = make_models(self.shape, device(), self.recomputes)
            self.describe(models)
            for stage, measured in (
                ("matrix product", self.product), (UPDATE, self.update), (REFERENCE, self.reference),
                (DECODE, self.decode), (LEAVING, self.leaving), (WHOLE, self.whole),
            ):  # fmt: skip
                if self.deadline.passed:
                    self.notes["no time for"] = stage
                    break
                measured(models, draw)
                self.save()
        except Exception as problem:  # a failure is a row of the table
            self.rows.append(Row(stage, OURS, reason=failure(problem)))
        self.save()

    def save(self) -> None:
        """Write the case as it is."""
        shape = self.shape
        about: dict[str, Any] = {
            "prompts": shape.prompts, "samples": shape.samples, "prompt tokens": list(shape.prompt_tokens),
            "response tokens": list(shape.tokens), "decoded tokens": shape.decoded, "whole step": shape.whole,
            "micro-batch tokens": shape.micro_batch, "lora": shape.lora, "recomputes": self.recomputes,
        }  # fmt: skip
        formula = "Useful FLOPs of live rows; tokens of a rollout are those of its responses"
        rows, notes = list(self.rows), dict(self.notes)
        case = Case("gpu_loop", self.name, about, "operations", formula, UPDATE, rows, provenance(self.plan), notes)
        results.save([case], self.folder)

    def describe(self, models: Models) -> None:
        """Note how the model reads and decodes, and what a run of it says about its memory."""
        model = models.policy.model
        said = describe_memory(models.config, model, model.config.vocab_size)
        most = re.search(r"([\d.]+) GiB +at most", said)
        self.notes["Memory"] = f"said to take {most[1]} GiB at most" if most else said
        self.notes["Reading"] = models.policy.attention.describe()
        self.notes["Decoding"] = describe_decoding(models.policy).removeprefix("decoding: ")

    def product(self, models: Models, draw: torch.Generator) -> None:
        """Time a large matrix product in bf16, the rate that shares of the machine refer to."""
        side, on = 64 if self.plan.rehearsal else LARGEST, models.policy.device
        a, b = (torch.randn(side, side, device=on, dtype=torch.bfloat16) for _ in range(2))
        torch.mm(a, b)
        seconds = [_timed(lambda: torch.mm(a, b)) for _ in range(5)]
        self.rows.append(Row("matrix product", LIMIT, seconds, work=2.0 * side**3))

    def update(self, models: Models, draw: torch.Generator) -> None:
        """Time updates whose lengths are new each time; the first is a row of its own."""
        updater, seconds, work = Updater(Actor(models.policy), models.config), [], []
        passes, before = 2 if self.shape.lora else 3, _reset_peak()
        for _ in range(1 + self.plan.rounds[NAME]):
            sequences = self.sequences(models, draw)
            rows, longest = sequences.response_mask.shape
            rewards, costs = torch.randn(2, rows, generator=draw)
            ref_logps = torch.full((rows, longest), -11.0)
            scores, none = Scores(rewards, costs), Predictions(None, {})
            batch = make_batch(models.config, sequences, scores, ref_logps, 1.0, 0.02, none)
            seconds.append(_timed(lambda batch=batch: updater.update(batch, STEPS // 2, STEPS)))
            work.append(passes * useful_work(models.policy.model, sequences).flops)
            if len(seconds) > 2 and self.deadline.passed:
                break
        mean = statistics.mean(work[1:])
        self.rows += [Row(FIRST, OURS, seconds[:1], work[0]), Row(UPDATE, OURS, seconds[1:], mean)]
        self.notes["Memory"] += f"; updates took {_peak() / GIB:.2f} GiB at their peak, {before / GIB:.2f} before them"
        self.updater = updater

    def reference(self, models: Models, draw: torch.Generator) -> None:
        """Time the reference's log-probabilities of responses whose lengths are new each time."""
        reference, budget, seconds, work = Actor(models.reference), self.shape.micro_batch, [], []
        for _ in range(1 + self.plan.rounds[NAME]):
            sequences = self.sequences(models, draw)
            seconds.append(_timed(lambda s=sequences: read_reference(reference, s, 1.0, budget, [])))
            work.append(useful_work(models.policy.model, sequences).flops)
        self.rows.append(Row(REFERENCE, OURS, seconds[1:], statistics.mean(work[1:])))

    def decode(self, models: Models, draw: torch.Generator) -> None:
        """Time rollouts of responses of one length; the first is a row of its own, since it captures the graphs."""
        endless = replace(models.policy, eos_ids=(-1,))
        tokens = float(self.shape.prompts * self.shape.samples * self.shape.decoded)
        seconds = [_timed(self.rollout(models, endless, draw)) for _ in range(1 + self.plan.rounds[NAME])]
        self.rows.append(Row(FIRST_DECODE, OURS, seconds[:1], tokens=tokens))
        self.rows.append(Row(DECODE, OURS, seconds[1:], tokens=tokens))

    def leaving(self, models: Models, draw: torch.Generator) -> None:
        """Time a rollout in which every token ends its row with a probability of four times one over its limit."""
        vocabulary = models.policy.model.config.vocab_size
        stops = tuple(range(2, 2 + max(1, 4 * vocabulary // self.shape.decoded)))
        ending = replace(models.policy, eos_ids=stops)
        lengths, call = [], self.rollout(models, ending, draw)
        seconds = [_timed(lambda: lengths.append(call().tokens)) for _ in range(2)]
        self.rows.append(Row(LEAVING, OURS, seconds[1:], tokens=float(lengths[-1])))

    def whole(self, models: Models, draw: torch.Generator) -> None:
        """Time a whole step: rollout, reference and update of the same responses."""
        if self.shape.whole is None:
            return
        prompts, samples, tokens = self.shape.whole
        config = replace(models.config.rollout, max_response_tokens=tokens)
        endless, reference = replace(models.policy, eos_ids=(-1,)), Actor(models.reference)
        budget = self.shape.micro_batch

        def step() -> None:
            asked = make_prompts(self.shape, prompts, endless.model.config.vocab_size, draw)
            rollout = sample(endless, asked, samples, config, 0, 0)
            ref_logps, _ = read_reference(reference, rollout.sequences, 1.0, budget, [])
            rewards, costs = torch.randn(2, prompts * samples, generator=draw)
            scores, none = Scores(rewards, costs), Predictions(None, {})
            batch = make_batch(models.config, rollout.sequences, scores, ref_logps, 1.0, 0.02, none)
            self.updater.update(batch, STEPS // 2, STEPS)

        seconds = [_timed(step) for _ in range(1 + self.plan.rounds[NAME])]
        self.rows.append(Row(WHOLE, OURS, seconds[1:], tokens=float(prompts * samples * tokens)))
        self.notes["First whole step"] = f"{seconds[0]:.2f} s"
        self.notes["Memory"] += f"; the whole loop {_peak() / GIB:.2f} GiB at its peak"

    def sequences(self, models: Models, draw: torch.Generator) -> Sequences:
        """Make responses of random tokens and lengths to random prompts."""
        shape, vocabulary = self.shape, models.policy.model.config.vocab_size
        prompts = make_prompts(shape, shape.prompts, vocabulary, draw)
        group = torch.arange(shape.prompts).repeat_interleave(shape.samples)
        lengths = torch.randint(shape.tokens[0], shape.tokens[1] + 1, (len(group),), generator=draw).tolist()
        responses = [torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in lengths]
        ids = [list(prompts[i].token_ids) for i in group.tolist()]
        return make_sequences(ids, responses, models.policy.pad_id, group)

    def rollout(self, models: Models, policy: Any, draw: torch.Generator) -> Callable[[], Any]:
        """Return a call that samples responses to new prompts."""
        shape, vocabulary = self.shape, models.policy.model.config.vocab_size
        prompts = make_prompts(shape, shape.prompts, vocabulary, draw)
        return lambda: sample(policy, prompts, shape.samples, models.config.rollout, 0, 0)


def _timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call, until the device has done everything."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def _device_memory() -> float:
    """Return the bytes of the device."""
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else float("inf")


def _reset_peak() -> float:
    """Begin to look for the peak; return the bytes in use."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())


def _peak() -> float:
    """Return the peak since then."""
    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0.0
