"""The training loop: sample -> reference -> score -> advantages -> update -> record."""

from __future__ import annotations

from .data.prompts import batch_at
from .models.actor import Actor, read_reference
from .rollout.gather import gather
from .runs.checkpoint import Saver, make_state, restore
from .runs.console import Display
from .runs.records import Timer, sample_records, step_record
from .session import Session, finish
from .training.batch import make_batch
from .training.mismatch import agreement, describe_mismatch
from .training.multipliers import Multipliers
from .training.truncation import for_training
from .training.update import Updater


def train(session: Session) -> None:
    """Train until the last step, evaluate before and after, and export the policy.

    Raises Stopped, after a checkpoint is written, if SIGINT or SIGTERM asked for it.
    """
    config, parts, actor, run, world = session.config, session.parts, session.actor, session.run, session.world
    algorithm, r, budget = config.algorithm, config.rollout, config.optimizer.budget
    multipliers, updater = Multipliers(algorithm, config.penalty), Updater(actor, config, parts.examples)
    reference, layers = Actor(parts.reference), parts.scorers.layers_of(parts.reference.model)
    with session.stop.at_once():
        before = session.evaluator.into_run(run, "before", parts.reference)
    first = resume(session, multipliers, updater)
    records = []  # metrics since the last checkpoint
    with (
        Saver(run.path, config.keep, config.safety_target, world, actor.sharded) as saver,
        Display(session.console, config, first) as display,
    ):
        for step in range(first, config.steps):
            timer = Timer()
            session.engine.update(step)
            prompts = batch_at(parts.train_prompts, step, r.prompts_per_step, config.seed)
            rollout = session.engine.sample(prompts, step, world.slice(len(prompts)))
            timer.mark("rollout")
            ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
            timer.mark("reference")
            scores = parts.scorers(rollout.prompts, rollout.texts, reading)
            rollout, scores, ref_logps = gather(world, rollout, scores, ref_logps, parts.policy.pad_id)
            timer.mark("score")
            saver.wait()  # the background checkpoint must finish before weights change
            sequences, judged = for_training(r, rollout, scores)
            predictions = updater.predict(sequences, step)
            lam, beta, limit = multipliers.lam, multipliers.beta, multipliers.limits.begin(scores.costs)
            batch = make_batch(config, sequences, judged, ref_logps, lam, beta, predictions, limit)
            result = updater.update(batch, step, config.steps)
            timer.mark("update")

            agreed = agreement(rollout.logps, result.logps, sequences.response_mask)
            record = step_record(step, algorithm, rollout, scores, batch, result, agreed, timer.seconds)
            record |= multipliers.limits.measure(scores.costs)
            rectified = record.get("limit_rectified_cost", record["rectified_cost"])
            multipliers.update(scores.costs.tolist(), rectified, record["kl"])
            samples = sample_records(step, rollout, scores, batch.advantages, algorithm.cost_limit)
            run.write(step, record, samples)
            records.append(record)
            display.step(record, samples, describe_mismatch(agreed, config))
            done, stopping = step + 1, world.any(session.stop.requested)
            if stopping or done == config.steps or (config.save_every and done % config.save_every == 0):
                skipped = updater.skipped_in_a_row
                state = make_state(done, multipliers.state_dict(), skipped, run.offsets, records, world)
                saver.start(state, actor, updater.optimizer)
                records = []
            if stopping and done < config.steps:
                saver.wait()
                session.stop.leave()
        saver.wait()
    with session.stop.at_once():
        finish(session, before)


def resume(session: Session, multipliers: Multipliers, updater: Updater) -> int:
    """Restore the state of a resumed run; return the step to begin with, 0 for a new run."""
    state, checkpoint = session.resumed.state, session.resumed.checkpoint
    if state is None or checkpoint is None:
        return 0
    updater.skipped_in_a_row = state.skipped_in_a_row
    multipliers.load_state_dict(state.penalty)
    restore(checkpoint, session.actor, updater.optimizer, session.world)
    return state.step
