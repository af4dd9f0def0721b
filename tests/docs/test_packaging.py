"""The extras of the package: each is named in README and docs, and none promises what nothing uses."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_is_named_in_readme_and_docs():
    for page in ("README.md", "docs/training.md"):
        text = (ROOT / page).read_text()
        assert [name for name in EXTRAS if f"`{name}`" not in text] == []


def test_every_package_of_an_optional_feature_is_imported_somewhere():
    folders = "repo", "repo_kernels"
    code = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    features = {"lora", "eightbit", "data", "liger", "tensorboard", "wandb", "trackio", "report", "trl", "verl"}
    for extra in features:
        name = re.match(r"[\w-]+", EXTRAS[extra][0])[0].replace("-", "_")
        assert re.search(rf"(import|from) {name}\b|\"{name}\"", code), extra
    assert set(EXTRAS) == features | {"embedded", "bench", "dev"}


def test_transformers_has_no_upper_bound_for_those_who_use_the_losses_alone():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [item for item in wanted if item.startswith("transformers")] == ["transformers>=5.0"]
