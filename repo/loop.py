"""The training loops: sample -> reference -> score -> advantages -> update -> record, and the same on pairs."""

from __future__ import annotations

from .config.schema import DUAL_EVERY
from .course import course_of
from .data.prompts import batch_at
from .models.actor import Actor, read_reference
from .models.credit import costliest, make_credit
from .rollout.gather import gather
from .rollout.pairs import draw_pairs
from .runs.records import Measured, Timer, pair_record, sample_records, step_record
from .session import Session
from .training.batch import make_batch
from .training.mismatch import agreement, describe_mismatch
from .training.multipliers import Multipliers
from .training.pairs import PairUpdater, make_pair_batch
from .training.truncation import for_training
from .training.update import Updater


def train(session: Session) -> None:
    """Train until the last step, evaluate before and after, and export the policy.

    Raises Stopped, after a checkpoint is written, if SIGINT or SIGTERM asked for it.
    """
    loop = train_on_pairs if session.config.algorithm.on_pairs else train_on_rollouts
    loop(session)


def train_on_rollouts(session: Session) -> None:
    """Train on the policy's own responses: RePO, and the baselines that differ in advantages and lambda."""
    config, parts, actor, world = session.config, session.parts, session.actor, session.world
    algorithm, r, budget = config.algorithm, config.rollout, config.optimizer.budget
    credit = make_credit(algorithm, parts.reference, world)
    multipliers, updater = Multipliers(algorithm, config.penalty), Updater(actor, config, parts.examples, credit)
    reference, layers = Actor(parts.reference), parts.scorers.layers_of(parts.reference.model)
    layers = sorted({*layers, *(credit.layers if credit else ())})
    with course_of(session, multipliers, updater) as course:
        for step in course.steps:
            timer = Timer()
            session.engine.update(step)
            prompts = batch_at(parts.train_prompts, step, r.prompts_per_step, config.seed)
            own = world.slice(len(prompts))
            rollout = session.engine.sample(prompts, step, own)
            timer.mark("rollout")
            ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
            timer.mark("reference")
            scores = parts.scorers(rollout.prompts, rollout.texts, reading)
            rollout, scores, ref_logps = gather(world, rollout, scores, ref_logps, parts.policy.pad_id)
            timer.mark("score")
            course.saver.wait()  # the background checkpoint must finish before weights change
            sequences, judged = for_training(r, rollout, scores)
            predictions = updater.predict(sequences, step)
            lam, beta, limit = multipliers.lam, multipliers.beta, multipliers.limits.begin(scores.costs)
            rows = range(own.start * r.samples_per_prompt, own.stop * r.samples_per_prompt)
            shares = updater.share_and_learn(reading, rows, sequences, judged.costs, limit)
            batch = make_batch(config, sequences, judged, ref_logps, lam, beta, predictions, limit, shares)
            result = updater.update(batch, step, config.steps)
            timer.mark("update")

            agreed = agreement(rollout.logps, result.logps, sequences.response_mask)
            record = step_record(step, algorithm, rollout, scores, batch, result, agreed, timer.seconds)
            record |= multipliers.limits.measure(scores.costs)
            rectified = record.get("limit_rectified_cost", record["rectified_cost"])
            multipliers.update(scores.costs.tolist(), rectified, record["kl"])
            named = [] if shares is None else costliest(shares, sequences, parts.policy.tokenizer.decode)
            samples = sample_records(step, rollout, scores, batch.advantages, algorithm.cost_limit, named)
            course.record(step, record, samples, describe_mismatch(agreed, config))


def train_on_pairs(session: Session) -> None:
    """Train on pairs of responses that are not the policy's own: constrained DPO and its rectified form.

    The policy samples only in every DUAL_EVERY-th step, after its update, to move lambda by the costs of what it says.
    """
    config, parts, world, r = session.config, session.parts, session.world, session.config.rollout
    algorithm, budget, pad_id = config.algorithm, config.optimizer.budget, parts.policy.pad_id
    multipliers, updater = Multipliers(algorithm, config.penalty), PairUpdater(session.actor, config)
    reference, layers = Actor(parts.reference), parts.scorers.layers_of(parts.reference.model)

    with course_of(session, multipliers, updater) as course:
        for step in course.steps:
            timer = Timer()
            prompts = batch_at(parts.train_prompts, step, r.prompts_per_step, config.seed)
            own = world.slice(len(prompts))
            pairs = draw_pairs(parts.reference, prompts, config, step, own)
            timer.mark("pairs")
            ref_logps, reading = read_reference(reference, pairs.sequences, r.temperature, budget, layers)
            timer.mark("reference")
            scores = parts.scorers(pairs.prompts, pairs.texts, reading)
            pairs, scores, ref_logps = gather(world, pairs, scores, ref_logps, pad_id)
            timer.mark("score")
            course.saver.wait()  # the background checkpoint must finish before weights change
            batch = make_pair_batch(algorithm, pairs.sequences, scores, ref_logps, multipliers.lam)
            result = updater.update(batch, step, config.steps)
            timer.mark("update")

            measured, samples = None, []
            if (step + 1) % DUAL_EVERY == 0:
                session.engine.update(step)
                rollout = session.engine.sample(prompts, step, own)
                ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
                scores = parts.scorers(rollout.prompts, rollout.texts, reading)
                measured = Measured.of(*gather(world, rollout, scores, ref_logps, pad_id))
                samples = sample_records(step, measured.rollout, measured.scores, None, algorithm.cost_limit)
                timer.mark("rollout")
            record = pair_record(step, algorithm, batch, result, measured, timer.seconds)
            if measured is not None:
                multipliers.update(measured.scores.costs.tolist(), record["rectified_cost"])
            course.record(step, record, samples)
