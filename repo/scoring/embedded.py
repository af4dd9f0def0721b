"""The embedded scorers and judge at run time: small heads on frozen features.

`HeadScorer` reads a causal LM's hidden states (the reference model can be shared, and one forward serves all
heads); `Judge` reads MiniLM sentence features and a word list. Nothing here is trained; the manifests beside
the weights say what was fitted on what (`repo.assets.fit`).

    reward, cost = score_all([HeadScorer.load(d / "scorers/reward"), HeadScorer.load(d / "scorers/cost")], x, y)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LM_HEAD_ROWS = 512
"""Rows of logits held at once, so that fluency costs rows x vocabulary bytes and not tokens x vocabulary."""


@dataclass(frozen=True)
class Features:
    """What the trunk says of N (prompt, response) pairs, cut after each of `cuts` response tokens.

    mean:    (N, cuts, hidden) layer state averaged over the response tokens; the last prompt token's if empty
    last:    (N, cuts, hidden) layer state of the last response token
    logprob: (N, cuts) mean log-probability per response token in nats; -inf if empty
    tokens:  (N, cuts) response tokens counted
    """

    mean: Tensor
    last: Tensor
    logprob: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Reading:
    """What a forward of a trunk has found about sampled responses, row by row, all on the CPU.

    ids:      tokens of the prompt and of the response
    states:   by layer, (1 + T, hidden) fp32 of each row, beginning with the last prompt token; empty if not read
    logprobs: (T or more,) of the response tokens in nats, at temperature 1
    """

    model: Any
    ids: Sequence[tuple[list[int], list[int]]]
    states: dict[int, list[Tensor]]
    logprobs: Sequence[Tensor]

    def find(self, row: int, layer: int, head: list[int], tail: list[int]) -> tuple[Tensor, Tensor] | None:
        """States and log-probabilities of the tokens `tail` after `head`, if the row begins with them."""
        prompt, response = self.ids[row]
        states, n = self.states[layer][row], len(tail)
        if prompt != head or response[:n] != tail or len(states) <= n:
            return None
        return states[: n + 1], self.logprobs[row][:n]


def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by rising length, in batches whose padded size stays within `budget` (or single sequences)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Trunk:
    """A frozen causal LM seen as a feature extractor of chat-formatted (prompt, response) pairs."""

    def __init__(self, model: Any, tokenizer: Any, max_prompt: int, max_response: int):
        self.model, self.tokenizer = model, tokenizer
        self.max_prompt, self.max_response = max_prompt, max_response

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids of the templated prompt (user text cut at `max_prompt` tokens) and of the response."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) > self.max_prompt:
            prompt = self.tokenizer.decode(ids[: self.max_prompt])
        head = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        tail = self.tokenizer(response, add_special_tokens=False).input_ids if response.strip() else []
        return head, tail[: self.max_response]

    @torch.no_grad()
    def features(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        layer: int,
        cuts: Sequence[int] | None = None,
        fluency: bool = True,
        budget: int = 4096,
        reading: Reading | None = None,
    ) -> Features:
        """Features of N pairs, in their order, from length-sorted batches of `budget` padded tokens.

        reading: where it begins with the pair's own tokens no forward is needed; text that another tokenisation gave is
        computed like any other.
        """
        cuts = tuple(cuts or (self.max_response,))
        pairs = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        rows: list[Any] = [None] * len(pairs)
        if reading is not None:
            for i, pair in enumerate(pairs):
                known = reading.find(i, layer, *pair)
                rows[i] = None if known is None else self._pool(known[0], known[1] if fluency else None, cuts)
        rest = [i for i, row in enumerate(rows) if row is None]
        for part in length_batches([len(pairs[i][0]) + len(pairs[i][1]) for i in rest], budget):
            batch = [rest[i] for i in part]
            for i, row in zip(batch, self._forward([pairs[i] for i in batch], layer, cuts, fluency), strict=True):
                rows[i] = row
        return Features(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _forward(self, pairs: list, layer: int, cuts: tuple[int, ...], fluency: bool) -> Iterator[tuple]:
        """One padded forward; yields (mean, last, logprob, tokens) of each pair on the CPU.

        Right padding under a causal mask never reaches a real token; the mask comes from the lengths.
        """
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(a) + len(b) for a, b in pairs], device=device)
        ids = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.long)
        for i, (head, tail) in enumerate(pairs):
            ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
        ids = ids.to(device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        out = self.model.base_model(ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
        states, final = out.hidden_states[layer], out.last_hidden_state
        for i, (head, tail) in enumerate(pairs):
            start, stop = len(head), len(head) + len(tail)
            logprobs = self._token_logprobs(final[i, start - 1 : stop - 1], ids[i, start:stop]) if fluency else None
            yield self._pool(states[i, start - 1 : stop].float(), logprobs, cuts)

    def _token_logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (T,) in fp32 of `targets` (T,) from the final `states` (T, hidden) before them."""
        lm_head = self.model.get_output_embeddings()
        parts = []
        for x, y in zip(states.split(LM_HEAD_ROWS), targets.split(LM_HEAD_ROWS), strict=True):
            logits = lm_head(x).float()
            parts.append(logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(parts)

    @staticmethod
    def _pool(states: Tensor, logprobs: Tensor | None, cuts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Pool one pair at each cut; `states` (1 + T, hidden) begins with the last prompt token."""
        total = states.shape[0] - 1
        mean, last, logprob, tokens = [], [], [], []
        for cut in cuts:
            n = min(cut, total)
            mean.append(states[1 : n + 1].mean(0) if n else states[0])
            last.append(states[n])
            score = torch.tensor(0.0) if logprobs is None else logprobs[:n].mean() if n else torch.tensor(-torch.inf)
            logprob.append(score.cpu())
            tokens.append(n)
        return torch.stack(mean).cpu(), torch.stack(last).cpu(), torch.stack(logprob), torch.tensor(tokens)


@dataclass(frozen=True)
class HeadManifest:
    """`scorer.json` of one signal. score = (sigmoid(head) - penalty - offset) / scale, where the penalty is
    fluency_weight * clamp(fluency_floor - logprob, 0, fluency_cap) with the mean log-prob per token in nats.
    """

    signal: str
    """`reward` or `cost`."""
    kind: str
    """Always `causal-lm-heads`."""
    model: str
    """Folder of the trunk, relative to the manifest's."""
    layer: int
    """Index into `hidden_states` (0 is the embedding)."""
    pooling: str
    """`mean` over response tokens, or `mean+last`."""
    max_prompt_tokens: int
    """Longer prompts are cut on the right before templating."""
    max_response_tokens: int
    """Longer responses are cut on the right."""
    offset: float
    """For a cost: the harm threshold. For a reward: its mean over reference samples."""
    scale: float
    """Standard deviation over reference samples."""
    units: str
    """What one unit means."""
    fluency_weight: float
    """Penalty per nat below the floor; 0 needs no LM head."""
    fluency_floor: float
    """Mean log-prob per token below which a reply is penalised, nats."""
    fluency_cap: float
    """Largest shortfall that counts, nats; an empty reply gets all of it."""
    sign_check: dict[str, str]
    """prompt, lower, higher: two canned answers whose scores must come in that order."""
    reference: dict[str, Any]
    """Statistics of the reference samples, the safe rate among them."""
    fit: dict[str, Any]
    """Label counts and grouped cross-validation figures."""

    @classmethod
    def read(cls, folder: Path) -> "HeadManifest":
        """Read `scorer.json`; an unknown or missing field is an error that names it."""
        content = json.loads((folder / "scorer.json").read_text())
        names = {f.name for f in fields(cls)}
        if wrong := names ^ content.keys():
            raise ValueError(f"{folder / 'scorer.json'} has missing or unknown fields: {', '.join(sorted(wrong))}")
        return cls(**content)


class HeadScorer:
    """One signal: a linear head on pooled trunk states, a fluency term, and the units of the manifest."""

    def __init__(self, manifest: HeadManifest, weight: Tensor, bias: Tensor, trunk: Trunk, batch_tokens: int):
        self.manifest, self.weight, self.bias = manifest, weight, bias
        self.trunk, self.batch_tokens = trunk, batch_tokens

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        batch_tokens: int = 4096,
    ) -> "HeadScorer":
        """Load a scorer folder. A given `model` (the frozen reference, say) is shared, else the manifest's is
        loaded to `device`; scorers that share a model share its forward in `score_all`."""
        folder = Path(folder)
        manifest = HeadManifest.read(folder)
        path = (folder / manifest.model).resolve()
        if model is None:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path)
        heads = load_file(folder / "heads.safetensors")
        trunk = Trunk(model, tokenizer, manifest.max_prompt_tokens, manifest.max_response_tokens)
        return cls(manifest, heads["weight"].float(), heads["bias"].float(), trunk, batch_tokens)

    @property
    def signal(self) -> str:
        """`reward` or `cost`."""
        return self.manifest.signal

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores (B,) fp32 on the CPU, in the manifest's units."""
        return score_all([self], prompts, responses)[0]

    def from_features(self, features: Features, cut: int = 0) -> Tensor:
        """Scores (B,) of features that were pooled at `cut` (an index into the cuts)."""
        m = self.manifest
        x = features.mean[:, cut]
        if m.pooling == "mean+last":
            x = torch.cat([x, features.last[:, cut]], dim=-1)
        value = torch.sigmoid(x @ self.weight + self.bias)
        if m.fluency_weight:
            value = value - m.fluency_weight * (m.fluency_floor - features.logprob[:, cut]).clamp(0, m.fluency_cap)
        return (value - m.offset) / m.scale


def score_all(
    scorers: Sequence[HeadScorer], prompts: Sequence[str], responses: Sequence[str], reading: Reading | None = None
) -> list[Tensor]:
    """Scores (B,) of each scorer; one forward serves all that share model, layer and length limits, and none is needed
    for rows that a reading of that model and layer holds."""
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(scorers):
        m = s.manifest
        key = (id(s.trunk.model), m.layer, m.max_prompt_tokens, m.max_response_tokens)
        groups.setdefault(key, []).append(i)
    scores: dict[int, Tensor] = {}
    for members in groups.values():
        first = scorers[members[0]]
        fluency = any(scorers[i].manifest.fluency_weight for i in members)
        layer, known = first.manifest.layer, reading
        if known is not None and (known.model is not first.trunk.model or layer not in known.states):
            known = None
        features = first.trunk.features(
            prompts, responses, layer, fluency=fluency, budget=first.batch_tokens, reading=known
        )
        scores |= {i: scorers[i].from_features(features) for i in members}
    return [scores[i] for i in range(len(scorers))]
