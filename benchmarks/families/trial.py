"""A trial of one family: what the library says of a sequence beside what the model itself says of it alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from repo.common.errors import UserError, first_line
from repo.config.schema import Config, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.actor import Actor, predict
from repo.models.policy import Policy, load_policy
from repo.rollout.decoding import choose_decoding
from repo.rollout.sample import Rollout, sample
from repo.scoring.scorers import Scores
from repo.training.batch import make_batch
from repo.training.update import Updater
from tests.support.tiny import QUESTIONS, make_tokenizer

from .tiny_config import tiny_config

CPU = torch.device("cpu")
BOUND = 1e-4  # nats a token between the library and the model alone, fp32
STEPS, SAMPLES, LIMIT, BUDGET = 2, 3, 9, 96


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    result: trains, refused, differs, fails, or not built. why: the sentence, or the error. layout, decoding: the ways
    of reading and of sampling. difference: the largest of log-probabilities, in nats.
    """

    family: str
    result: str
    why: str = ""
    layout: str = ""
    decoding: str = ""
    difference: float = 0.0


def build(family: str, folder: Path) -> None:
    """Save a tiny random model of a family, with a tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer))).eval()
    if any(not p.isfinite().all() for p in model.parameters()):
        raise ValueError("its random weights are not finite")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(family: str, folder: Path) -> dict[str, Any]:
    """Build a family, load it, sample and update twice; returns an Outcome as a dict."""
    try:
        build(family, folder)
    except Exception as error:
        return asdict(Outcome(family, "not built", " ".join(str(error).split())[:300]))
    try:
        policy = load_policy(str(folder), CPU, trainable=True)
        decoding = choose_decoding(policy)
        difference = _train(policy)
    except UserError as error:
        return asdict(Outcome(family, "refused", str(error)))
    except Exception as error:
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f" ({Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno})" if where else ""
        return asdict(Outcome(family, "fails", first_line(error) + place))
    layout = "packed" if policy.attention.packs else "padded" if policy.attention.pads else "one at a time"
    way = ("cache" if decoding.cached else "no cache") + ("" if decoding.batches else ", one prompt at a time")
    way += "" if decoding.selects or not decoding.cached else ", rows stay"
    why = "; ".join(dict.fromkeys(filter(None, ("" if policy.attention.packs else policy.attention.why, decoding.why))))
    result = "trains" if difference <= BOUND else "differs"
    return asdict(Outcome(family, result, why, layout, way, difference))


def _train(policy: Policy) -> float:
    """Sample and update STEPS times; returns the largest difference from the model alone, of sampling and of reading.

    Raises ValueError if no weight changes, or if the gradient is not that of the sequences read alone.
    """
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS[:3]], policy.tokenizer, None, 99).kept
    rollouts = RolloutConfig(max_response_tokens=LIMIT, prompts_per_step=3, samples_per_prompt=SAMPLES)
    config = Config(rollout=rollouts)
    actor, difference = Actor(policy), 0.0
    updater = Updater(actor, config, [])
    for step in range(STEPS):
        rollout = sample(policy, prompts, SAMPLES, rollouts, seed=step, step=step)
        alone = _alone(policy, rollout)
        read = predict(actor, rollout.sequences, 1.0, BUDGET).logps
        assert read is not None
        mask = rollout.sequences.response_mask
        difference = max(difference, *(float((x - alone.detach())[mask].abs().max()) for x in (rollout.logps, read)))
        if not difference < BOUND:
            return difference
        if step == 0:
            _check_gradient(policy, actor, rollout, alone)
        scores = Scores(torch.randn(len(mask)), torch.randn(len(mask)))
        before = [p.detach().clone() for p in policy.model.parameters()]
        batch = make_batch(config, rollout.sequences, scores, read, 1.0, 0.1, updater.predict(rollout.sequences, step))
        updater.update(batch, step, STEPS)
        if all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True)):
            raise ValueError("an update changed no weight")
    return difference


def _alone(policy: Policy, rollout: Rollout) -> Tensor:
    """Compute the log-probabilities (B, R) of the responses by one plain pass of the model for each."""
    rows, width = [], rollout.sequences.response_ids.shape[1]
    for prompt, response in rollout.sequences.token_lists():
        logits = policy.model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logps = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
        logps = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logps, (0, width - len(response))))
    return torch.stack(rows)


def _check_gradient(policy: Policy, actor: Actor, rollout: Rollout, alone: Tensor) -> None:
    """Raise ValueError unless the gradient of all log-probabilities is that of the sequences read alone."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone.sum(), parameters, allow_unused=True)
    rows, total = torch.arange(len(alone)), [torch.zeros_like(p) for p in parameters]
    for packed in actor.parts(rollout.sequences, rows, BUDGET):
        logps = actor(packed, lambda states, _: states.logps(1.0))
        for into, part in zip(total, torch.autograd.grad(logps.sum(), parameters, allow_unused=True), strict=True):
            if part is not None:
                into += part
    wanted = torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, expected, strict=True)]
    )
    got = torch.cat([g.flatten() for g in total])
    error = float((got - wanted).norm() / wanted.norm())
    if not error < 1e-3:
        raise ValueError(f"the gradient differs from that of sequences read alone by {error:.1e}")
