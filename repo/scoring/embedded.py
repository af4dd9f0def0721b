"""The embedded scorers at run time: small linear heads on a frozen causal LM's hidden states.

All heads share one forward pass, and the LM can be the run's reference model. Nothing is trained here: repo.assets.fit
fits the heads, and the manifest beside the weights says on what data.

    reward, cost = score_all([HeadScorer.load(d / "scorers/reward"), HeadScorer.load(d / "scorers/cost")], x, y)
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data.conversation import with_system

LM_HEAD_ROWS = 512
"""Rows of logits that exist at once; bounds the memory of fluency, whatever the number of tokens."""


@dataclass(frozen=True)
class Features:
    """Features of N (prompt, response) pairs, each with its response cut at several lengths.

    mean:    (N, cuts, hidden) layer state averaged over the response tokens; for an empty response the last prompt
             token's state
    last:    (N, cuts, hidden) layer state of the last response token
    mean_logp: (N, cuts) mean log-probability per response token in nats; -inf for an empty response, 0 if not computed
    tokens:  (N, cuts) number of response tokens after the cut
    """

    mean: Tensor
    last: Tensor
    mean_logp: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Reading:
    """States and log-probabilities that a forward pass computed for sampled responses, one entry per row, on the CPU.

    It lets scorers that read the same model skip a forward pass of their own.

    model:    the causal LM that ran
    ids:      token ids of the prompt and of the response
    states:   layer -> (1 + T, hidden) fp32 of each row, where the first state is the last prompt token's
    logps: (T or more,) log-probabilities of the response tokens in nats, at temperature 1
    """

    model: Any
    ids: Sequence[tuple[list[int], list[int]]]
    states: dict[int, list[Tensor]]
    logps: Sequence[Tensor]

    def find(self, row: int, layer: int, head: list[int], tail: list[int]) -> tuple[Tensor, Tensor] | None:
        """Return the states (1 + n, hidden) and log-probabilities (n,) of the n tokens `tail` after the prompt `head`.

        Returns None unless the row's prompt is `head` and its response begins with `tail`.
        """
        prompt, response = self.ids[row]
        states, n = self.states[layer][row], len(tail)
        if prompt != head or response[:n] != tail or len(states) <= n:
            return None
        return states[: n + 1], self.logps[row][:n]


def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of indices by rising length, each of at most `budget` padded tokens or of a single sequence."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Trunk:
    """A frozen causal LM as a feature extractor of chat-formatted (prompt, response) pairs."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_prompt: int,
        max_response: int,
        system_prompt: str | None = None,
        frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """max_prompt, max_response: tokens at which texts are cut on the right. system_prompt: before each prompt.

        frozen: context in which the model is the frozen one, such as that without its adapters.
        """
        self.model, self.tokenizer, self.frozen = model, tokenizer, frozen
        self.max_prompt, self.max_response, self.system_prompt = max_prompt, max_response, system_prompt

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Tokenise the prompt in the chat template, and the response, each cut to its limit of tokens."""
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) > self.max_prompt:
            prompt = self.tokenizer.decode(ids[: self.max_prompt])
        head = self.tokenizer.apply_chat_template(
            with_system([{"role": "user", "content": prompt}], self.system_prompt),
            add_generation_prompt=True,
            return_dict=True,
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
        """Compute the features of N pairs, in their order.

        Args:
            layer: index into hidden_states whose state is pooled. cuts: response lengths in tokens; default: only the
                limit max_response. fluency: compute log-probabilities, which needs the LM head.
            budget: padded tokens of one forward pass.
            reading: results of an earlier forward pass over the same rows. A pair is computed again only where the
                reading holds other tokens, as when text does not tokenise back to the sampled ones.
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
        """Run one padded forward pass and yield (mean, last, mean_logp, tokens) of each pair on the CPU.

        Under a causal mask no token attends to the padding on its right. The mask is made from the lengths.
        """
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(a) + len(b) for a, b in pairs], device=device)
        ids = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.long)
        for i, (head, tail) in enumerate(pairs):
            ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
        ids = ids.to(device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        with self.frozen():
            out = self.model.base_model(ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True)
        states, final = out.hidden_states[layer], out.last_hidden_state
        for i, (head, tail) in enumerate(pairs):
            start, stop = len(head), len(head) + len(tail)
            logps = self._token_logps(final[i, start - 1 : stop - 1], ids[i, start:stop]) if fluency else None
            yield self._pool(states[i, start - 1 : stop].float(), logps, cuts)

    def _token_logps(self, states: Tensor, targets: Tensor) -> Tensor:
        """Compute log-probabilities (T,) fp32 of `targets` (T,) from the final states (T, hidden) that predict them."""
        lm_head = self.model.get_output_embeddings()
        parts = []
        for x, y in zip(states.split(LM_HEAD_ROWS), targets.split(LM_HEAD_ROWS), strict=True):
            logits = lm_head(x).float()
            parts.append(logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(parts)

    @staticmethod
    def _pool(states: Tensor, logps: Tensor | None, cuts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Pool one pair at each cut. states: (1 + T, hidden), of which the first is the last prompt token's."""
        total = states.shape[0] - 1
        mean, last, mean_logp, tokens = [], [], [], []
        for cut in cuts:
            n = min(cut, total)
            mean.append(states[1 : n + 1].mean(0) if n else states[0])
            last.append(states[n])
            score = torch.tensor(0.0) if logps is None else logps[:n].mean() if n else torch.tensor(-torch.inf)
            mean_logp.append(score.cpu())
            tokens.append(n)
        return torch.stack(mean).cpu(), torch.stack(last).cpu(), torch.stack(mean_logp), torch.tensor(tokens)


@dataclass(frozen=True)
class HeadManifest:
    """The fields of `scorer.json`, the manifest of one embedded scorer.

    score = (sigmoid(head) - penalty - offset) / scale, where penalty is
    fluency_weight * clamp(fluency_floor - mean_logp, 0, fluency_cap), with the mean log-probability per token in nats.
    """

    signal: str
    """`reward` or `cost`."""
    kind: str
    """Always `causal-lm-heads`."""
    model: str
    """Folder of the trunk, relative to the manifest's folder."""
    layer: int
    """Index into `hidden_states` (0 is the embedding)."""
    pooling: str
    """`mean` over response tokens, or `mean+last`, which appends the last token's state."""
    max_prompt_tokens: int
    """Limit of the prompt in tokens; the rest is cut off before the chat template is applied."""
    max_response_tokens: int
    """Limit of the response in tokens; the rest is cut off."""
    system_prompt: str | None
    """System message before the prompt; None leaves it to the chat template."""
    offset: float
    """Raw score that counts as 0: for a cost the harm threshold, for a reward the mean over reference samples."""
    scale: float
    """Raw score per unit: the standard deviation over reference samples."""
    units: str
    """Meaning of one unit of the score, in words."""
    fluency_weight: float
    """Penalty per nat below the floor; with 0 the LM head is not needed."""
    fluency_floor: float
    """Mean log-probability per token, in nats, below which a response is penalised."""
    fluency_cap: float
    """Largest shortfall that is penalised, in nats; an empty response gets the penalty of this shortfall."""
    sign_check: dict[str, str]
    """prompt, lower, higher: a prompt and two canned answers, of which `higher` must get the higher score."""
    reference: dict[str, Any]
    """Statistics of the reference samples, among them the safe rate."""
    fit: dict[str, Any]
    """Counts of labels and results of grouped cross-validation."""

    @classmethod
    def read(cls, folder: Path) -> "HeadManifest":
        """Read `scorer.json` of a folder. Raises ValueError that names unknown or missing fields."""
        content = json.loads((folder / "scorer.json").read_text())
        names = {f.name for f in fields(cls)}
        if wrong := names ^ content.keys():
            raise ValueError(f"{folder / 'scorer.json'} has missing or unknown fields: {', '.join(sorted(wrong))}")
        return cls(**content)


class HeadScorer:
    """An embedded scorer of one signal: a linear head on pooled trunk states, and a fluency penalty.

    The manifest gives the offset and scale of its scores.
    """

    def __init__(self, manifest: HeadManifest, weight: Tensor, bias: Tensor, trunk: Trunk, batch_tokens: int):
        """weight, bias: of the head, (F,) and () fp32. batch_tokens: padded tokens of one forward pass."""
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
        frozen: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> "HeadScorer":
        """Load a scorer from its folder.

        model, tokenizer: shared with others, e.g. the frozen reference; None: load the manifest's model to `device`.
        frozen: context in which a shared model is the frozen one.
        Scorers that share a model also share its forward pass in `score_all`. batch_tokens: padded tokens of one pass.
        """
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
        limits = manifest.max_prompt_tokens, manifest.max_response_tokens
        trunk = Trunk(model, tokenizer, *limits, manifest.system_prompt, frozen)
        return cls(manifest, heads["weight"].float(), heads["bias"].float(), trunk, batch_tokens)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Score B pairs; returns (B,) fp32 on the CPU, in the manifest's units."""
        return score_all([self], prompts, responses)[0]

    def from_features(self, features: Features, cut: int = 0) -> Tensor:
        """Compute scores (B,) from features. cut: index of the response length at which they were pooled."""
        m = self.manifest
        x = features.mean[:, cut]
        if m.pooling == "mean+last":
            x = torch.cat([x, features.last[:, cut]], dim=-1)
        value = torch.sigmoid(x @ self.weight + self.bias)
        if m.fluency_weight:
            value = value - m.fluency_weight * (m.fluency_floor - features.mean_logp[:, cut]).clamp(0, m.fluency_cap)
        return (value - m.offset) / m.scale


def score_all(
    scorers: Sequence[HeadScorer], prompts: Sequence[str], responses: Sequence[str], reading: Reading | None = None
) -> list[Tensor]:
    """Score B pairs by several scorers; returns (B,) fp32 for each scorer.

    One forward pass serves all scorers with the same model, layer, length limits and system prompt.
    reading: results of an earlier forward pass; the rows that it holds for a scorer's model and layer are not computed
    again.
    """
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(scorers):
        m = s.manifest
        key = (id(s.trunk.model), m.layer, m.max_prompt_tokens, m.max_response_tokens, m.system_prompt)
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
