"""Shield: at generation time, draw responses until one is surely within the cost limit.

The upper cost of a response is the mean of an ensemble of cost scorers plus z of their standard deviations. The first
response whose upper cost is at most the limit is returned; if none of those drawn is, the one of least upper cost, or a
fixed refusal. A filter beside the policy is the idea of confidence-based filters (arXiv 2207.01337) and of
permissibility shields (arXiv 2405.19414), of which only the abstracts were read; the rule for responses is ours.

    shield = Shield(load_policy(path, device, trainable=False), harm, limit=0.0, samples=4)
    shield(["How do I bake bread?"]).texts
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.config_fields import context_of
from ..common.errors import UserError, first_line
from ..config.schema import RolloutConfig
from ..data.prompts import Prompt, encode_prompt
from ..models.policy import Policy
from ..scoring.classifier import ClassifierScorer
from ..scoring.embedded import HeadScorer
from ..scoring.function import FunctionScorer
from ..scoring.safety import is_safe
from ..scoring.scorers import Scorers, require_finite, score_each
from .sample import draw_uniforms, sample_by
from .stop_tokens import with_stop_tokens

LOADED = (HeadScorer, ClassifierScorer, FunctionScorer)
OF_TRAINING = ("model", "update", "sample")
"""What training asks of a policy or of an engine, and a shield refuses."""

CostScorer = Scorers | HeadScorer | ClassifierScorer | FunctionScorer | Callable[[list[str], list[str]], Any]
"""Scores the cost of B responses: the cost of a configuration, one loaded scorer, or a function of two lists of texts,
prompts and responses, that returns B numbers."""


@dataclass(frozen=True)
class Shielded:
    """P responses that a shield has returned, in the order of the prompts; tensors are on the CPU.

    prompts: P prompts. texts: P responses, without special tokens; the refusal where a prompt is refused.
    accepted: (P,) bool, the upper cost is within the limit. refused: (P,) bool, the text is the fixed refusal.
    draws: (P,) int64, responses drawn for the prompt, 1 to `samples`.
    mean, deviation, upper: (P,) fp64, cost of the chosen response over the ensemble in the scorers' units, and mean +
    z * deviation. Of a refused prompt they are those of the response of least upper cost, which was not returned.
    tokens: (P,) int64, tokens of the text. truncated: (P,) bool, the response ended at the limit of tokens.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    accepted: Tensor
    refused: Tensor
    draws: Tensor
    mean: Tensor
    deviation: Tensor
    upper: Tensor
    tokens: Tensor
    truncated: Tensor


@dataclass(frozen=True)
class _Drawn:
    """A response that was drawn, with its cost; fields as in Shielded."""

    text: str
    mean: float
    deviation: float
    upper: float
    tokens: int
    truncated: bool


class Shield:
    """A policy behind a filter: up to `samples` draws per prompt, of which the first acceptable one is returned.

    It is for generation and evaluation. Training refuses it, since the responses that it returns are not distributed as
    the policy's own, so that the ratio of the loss would be wrong.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: CostScorer | Sequence[CostScorer],
        limit: float,
        samples: int = 4,
        z: float = 1.64,
        *,
        refusal: str | None = None,
        rollout: RolloutConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Check the arguments, and add the stop token of the chat template to the policy's.

        Args:
            policy: any model that repo.models.policy.load_policy loads.
            scorer: one cost scorer, whose deviation counts as 0, or an ensemble of several in the same units.
            limit: d, in the units of the scorers; a response is acceptable iff its upper cost is at most d.
            samples: most responses drawn for a prompt, >= 1.
            z: standard deviations of the ensemble added to its mean, >= 0. 1.64 is the one-sided 95 % point of a normal
                distribution, which an ensemble need not follow.
            refusal: text returned for a prompt without an acceptable draw; None: the draw of least upper cost, the
                first of equal ones.
            rollout: max_response_tokens, temperature, top_p, stop_tokens and batch_size; None: the defaults.
            seed: decides the draws, together with the prompt's id.

        Raises:
            UserError: an argument has a value that it does not take.
        """
        if not isinstance(policy, Policy):
            takes = "a Policy, as repo.models.policy.load_policy returns it"
            raise UserError(f"Shield: policy must be {takes}; got {type(policy).__name__}")
        ensemble: list[Any] = list(scorer) if isinstance(scorer, (list, tuple)) else [scorer]
        wrong = [type(s).__name__ for s in ensemble if not (isinstance(s, (Scorers, *LOADED)) or callable(s))]
        if not ensemble or wrong:
            got = wrong[0] if wrong else "an empty list"
            raise UserError(f"Shield: scorer must be a cost scorer or a list of at least one; got {got}")
        require_settings("Shield: ", samples, z, limit)
        if refusal is not None and not (isinstance(refusal, str) and refusal.strip()):
            raise UserError(f"Shield: refusal must be a text that is not empty, or None; got {refusal!r}")
        self.rollout = rollout or RolloutConfig()
        self.policy, _ = with_stop_tokens(policy, self.rollout.stop_tokens)
        self.ensemble, self.limit, self.samples, self.z = ensemble, float(limit), samples, float(z)
        self.refusal, self.seed = refusal, seed

    def __getattr__(self, name: str) -> Any:
        """Refuse by a sentence what training would read. Raises UserError for it, AttributeError for other names."""
        if name in OF_TRAINING:
            raise UserError(
                "a Shield cannot be the policy or the engine of training: its responses are not distributed as the "
                "policy's own, so that the ratio of the loss would be wrong; train the policy and shield it afterwards"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str | Prompt],
        step: int | str = "shield",
        advance: Callable[[int], None] = lambda _: None,
    ) -> Shielded:
        """Answer P >= 1 prompts.

        Draw j of a prompt is response j that `repo.rollout.sample.sample` draws for it with the same seed and step.
        Only prompts that have no acceptable response yet are drawn again, in batches of rollout.batch_size.

        Args:
            prompts: questions, or prompts, which are tokenised by the policy's chat template unless they are already.
            step: decides the draws, like the seed. The same call gives the same responses.
            advance: called with the number of prompts that are done since its last call.

        Raises:
            UserError: there is no prompt, a prompt leaves no room for a response, or a scorer fails.
        """
        if not prompts or isinstance(prompts, str):
            raise UserError(f"Shield: takes a list of at least one prompt; got {prompts!r}")
        asked = [self._encoded(prompt) for prompt in prompts]
        count, limit = len(asked), self.rollout.max_response_tokens
        uniforms = draw_uniforms(asked, self.samples, limit, self.seed, step).view(count, self.samples, limit)
        best: list[_Drawn | None] = [None] * count
        draws, accepted = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        left = list(range(count))
        for number in range(self.samples):
            for row, drawn in zip(left, self._draw([asked[i] for i in left], uniforms[left, number]), strict=True):
                draws[row] += 1
                accepted[row] = bool(is_safe(drawn.upper, self.limit))
                known = best[row]
                if accepted[row] or known is None or drawn.upper < known.upper:
                    best[row] = drawn
            before, left = len(left), [i for i in left if not accepted[i]]
            advance(before - len(left))
            if not left:
                break
        advance(len(left))
        return self._returned(asked, [drawn for drawn in best if drawn is not None], accepted, draws)

    def _encoded(self, prompt: str | Prompt) -> Prompt:
        """Return a prompt with its token ids. Raises UserError if they leave no room for a response."""
        if isinstance(prompt, str):
            prompt = Prompt(hashlib.sha256(prompt.encode()).hexdigest()[:16], prompt, "")
        ids = prompt.token_ids or tuple(encode_prompt(self.policy.tokenizer, prompt))
        context = context_of(self.policy.model.config.get_text_config())
        if context and len(ids) + self.rollout.max_response_tokens > context:
            raise UserError(
                f"Shield: {prompt.name} has {len(ids)} tokens, which leaves no room for "
                f"rollout.max_response_tokens={self.rollout.max_response_tokens} in a context of {context}"
            )
        return dataclasses.replace(prompt, token_ids=ids)

    def _draw(self, prompts: list[Prompt], uniforms: Tensor) -> list[_Drawn]:
        """Draw and score one response to each prompt. uniforms: (P, limit)."""
        rollout = sample_by(self.policy, prompts, 1, self.rollout, uniforms)
        mean, deviation = ensemble_costs(self.ensemble, prompts, rollout.texts)
        columns = (mean, deviation, mean + self.z * deviation, rollout.sequences.response_lengths, rollout.truncated)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [_Drawn(text, *row) for text, row in zip(rollout.texts, rows, strict=True)]

    def _returned(self, prompts: list[Prompt], best: list[_Drawn], accepted: Tensor, draws: Tensor) -> Shielded:
        """Put the results together, with the refusal in place of what is not acceptable, if there is one."""
        refused = ~accepted & (self.refusal is not None)
        texts, tokens = [drawn.text for drawn in best], torch.tensor([drawn.tokens for drawn in best])
        if self.refusal is not None:
            texts = [self.refusal if no else text for no, text in zip(refused.tolist(), texts, strict=True)]
            length = len(self.policy.tokenizer(self.refusal, add_special_tokens=False).input_ids)
            tokens = tokens.masked_fill(refused, length)
        mean, deviation, upper = (
            torch.tensor([getattr(drawn, name) for drawn in best], dtype=torch.float64)
            for name in ("mean", "deviation", "upper")
        )
        truncated = torch.tensor([drawn.truncated for drawn in best]) & ~refused
        return Shielded(
            tuple(prompts), tuple(texts), accepted, refused, draws, mean, deviation, upper, tokens, truncated
        )


def require_settings(where: str, samples: Any, z: Any, limit: Any = 0.0) -> None:
    """Raise UserError unless samples is an integer >= 1, z a finite number >= 0 and limit finite. where: a prefix."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise UserError(f"{where}samples must be an integer >= 1; got {samples!r}")
    if not _is_number(z) or z < 0:
        raise UserError(f"{where}z must be a finite number >= 0; got {z!r}")
    if not _is_number(limit):
        raise UserError(f"{where}limit must be a finite number; got {limit!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ensemble_costs(
    ensemble: Sequence[CostScorer], prompts: Sequence[Prompt], responses: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Compute the mean and the standard deviation of the costs of B responses over M >= 1 scorers, (B,) fp64 each.

    The deviation is the unbiased one, sum (c - mean)^2 / (M - 1) under the root, and 0 for a single scorer.
    Raises UserError if a scorer fails or gives a cost that is not finite.
    """
    loaded = [i for i, scorer in enumerate(ensemble) if isinstance(scorer, LOADED)]
    scores = score_each([ensemble[i] for i in loaded], prompts, responses)  # type: ignore[misc]
    known, rows = dict(zip(loaded, scores, strict=True)), []
    for i, scorer in enumerate(ensemble):
        row = known[i] if i in known else _costs_of(scorer, prompts, responses)
        require_finite(f"Shield: scorer {i + 1} of {len(ensemble)}", row, prompts)
        rows.append(row.double().cpu())
    costs = torch.stack(rows)  # (M, B)
    mean = costs.mean(0)
    return mean, costs.std(0) if len(rows) > 1 else torch.zeros_like(mean)


def _costs_of(scorer: Any, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
    """Compute the costs (B,) by the cost of a configuration or by a function of texts."""
    if isinstance(scorer, Scorers):
        return scorer.costs(prompts, responses)
    name = getattr(scorer, "__name__", type(scorer).__name__)
    values = scorer([prompt.text for prompt in prompts], list(responses))
    try:
        costs = torch.as_tensor(values, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"Shield: scorer {name} must return {len(responses)} numbers; {first_line(error)}") from None
    if costs.shape != (len(responses),):
        raise UserError(f"Shield: scorer {name} must return {len(responses)} numbers; got shape {tuple(costs.shape)}")
    return costs
