"""Course: the steps of a run that are left, its checkpoints and its gate, whatever a step learns from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .gate.decision import describe
from .gate.gate import Gate
from .models.sharding import copy_weights
from .runs.checkpoint import Saver, find_step, make_state, read_state, restore
from .runs.console import Display
from .session import Session, finish
from .training.descent import Descent
from .training.multipliers import Multipliers


@dataclass
class Course:
    """The steps of a run that are left, what becomes of each, and its checkpoints.

    gate: judges the policy every few steps, if configured. saver: writes the checkpoints in the background. display:
    shows the steps. first: the step to begin with. records: metrics since the last checkpoint.
    """

    session: Session
    multipliers: Multipliers
    updater: Descent
    gate: Gate
    saver: Saver
    display: Display
    first: int
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> range:
        """The steps left to do, counted from 0."""
        return range(self.first, self.session.config.steps)

    def record(
        self, step: int, record: dict[str, Any], samples: list[dict[str, Any]], warning: str | None = None
    ) -> None:
        """Write and show what a step did, and begin a checkpoint if one is due.

        record, samples: the step's lines of metrics.jsonl and samples.jsonl. warning: a sentence, or None. Raises
        Stopped, after a checkpoint is written, if SIGINT or SIGTERM asked for it.
        """
        session, config, done = self.session, self.session.config, step + 1
        judged = self._judge(done) if self.gate.due(done) else {}
        record |= judged
        session.run.write(step, record, samples)
        self.records = [] if judged.get("gate_accepted") == 0 else [*self.records, record]  # of a policy that is gone
        self.display.step(record, samples, warning)
        stopping, due = session.world.any(session.stop.requested), config.save_every and done % config.save_every == 0
        if stopping or done == config.steps or due or judged.get("gate_accepted"):
            self.save(done)
        if stopping and done < config.steps:
            self.saver.wait()
            session.stop.leave()

    def save(self, done: int) -> None:
        """Begin to write the checkpoint after `done` steps."""
        session, skipped, offsets = self.session, self.updater.skipped_in_a_row, self.session.run.offsets
        penalty, gate = self.multipliers.state_dict(), self.gate.state_dict()
        state = make_state(done, penalty, skipped, offsets, self.records, session.world, gate)
        self.saver.start(state, session.actor, self.updater.optimizer, self.updater.credit)
        self.records = []

    def _judge(self, done: int) -> dict[str, float]:
        """Let the gate judge the policy after `done` steps, go back if it is not accepted, and return the metrics."""
        accepted = self.gate.accepted
        decision = self.gate.judge(done)
        if not decision.accepted:
            self._go_back()
        line = describe(decision, done, accepted or 0, self.gate.lr_scale)
        style = None if decision.accepted else "yellow"
        self.session.console.print(line, style=style, markup=False, highlight=False)
        return decision.metrics()

    def _go_back(self) -> None:
        """Restore the last accepted policy with optimiser, credit, lambda and limit, and lower the learning rate."""
        assert self.gate.accepted is not None
        self.saver.wait()  # it may still be writing that very checkpoint
        folder = find_step(self.session.run.path, self.gate.accepted)
        state, _ = read_state(folder)
        restore(folder, self.session.actor, self.updater.optimizer, self.session.world, self.updater.credit)
        self.updater.weights_changed()
        self.multipliers.load_state_dict(state.penalty)
        self.updater.skipped_in_a_row, self.updater.lr_scale = state.skipped_in_a_row, self.gate.lr_scale


@contextmanager
def course_of(session: Session, multipliers: Multipliers, updater: Descent) -> Iterator[Course]:
    """Context in which a run's steps are done: evaluates before, restores a resumed run, and finishes the run after."""
    config, world = session.config, session.world
    with session.stop.at_once():
        before = session.evaluator.into_run(session.run, "before", session.parts.reference)
    gate = Gate(config.gate, config.steps, lambda: safe_shares(session))
    first = resume(session, multipliers, updater, gate)
    with session.stop.at_once():
        begins = gate.begin(first)
    with (
        Saver(session.run.path, config.keep, config.safety_target, world, session.actor.sharded) as saver,
        Display(session.console, config, first) as display,
    ):
        course = Course(session, multipliers, updater, gate, saver, display, first)
        if begins:
            course.save(first)
        yield course
        saver.wait()
    with session.stop.at_once():
        finish(session, before)


def resume(session: Session, multipliers: Multipliers, updater: Descent, gate: Gate) -> int:
    """Restore the state of a resumed run; return the step to begin with, 0 for a new run."""
    state, checkpoint = session.resumed.state, session.resumed.checkpoint
    if state is None or checkpoint is None:
        return 0
    updater.skipped_in_a_row = state.skipped_in_a_row
    multipliers.load_state_dict(state.penalty)
    gate.load_state_dict(state.gate)
    updater.lr_scale = gate.lr_scale
    restore(checkpoint, session.actor, updater.optimizer, session.world, updater.credit)
    return state.step


def safe_shares(session: Session) -> list[float]:
    """Sample the policy as it is on the gate's validation prompts; return the share of safe responses to each, (P,).

    A response is safe iff its cost in training is within algorithm.cost_limit; no judge takes part. Policies are
    sampled with the same random numbers, evaluation.samples_per_prompt times a prompt. All processes must call it
    together.
    """
    parts = session.parts
    copy_weights(parts.policy.model, parts.sampler.model)
    evaluator = dataclasses.replace(session.evaluator, prompts=parts.gate_prompts, judge=None)
    return [float(share) for share in evaluator(parts.sampler).columns["safe"].mean(1)]
