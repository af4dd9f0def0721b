"""A run that version 0.1.0 began goes on under this version."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from repo import train
from repo.config.renamed import RENAMED

RECORDED = Path(__file__).parent.parent / "recorded" / "run_0_1_0"
TIME_FIELDS = ("seconds_", "tokens_per_second", "update_tokens_per_second")


def lines(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(TIME_FIELDS)} for r in records]


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """A copy of the recorded run, in the working directory that its relative paths mean."""
    shutil.copytree(RECORDED, tmp_path / "recorded")
    monkeypatch.chdir(tmp_path / "recorded")
    monkeypatch.delitem(sys.modules, "my_scorers", raising=False)
    return Path("run")


def test_a_run_of_version_0_1_goes_on_as_it_would_have_and_is_told_the_new_names(old_run, capsys):
    before = (old_run / "metrics.jsonl").read_bytes()
    evaluation = (old_run / "eval" / "before.json").read_bytes()
    train.run_command(["--resume", str(old_run), "--steps=4"])
    output = capsys.readouterr()
    config = yaml.safe_load((RECORDED / "run" / "config.yaml").read_text())
    for old, new in RENAMED.items():
        group, field = old.split(".")
        assert field in config[group]
        assert f"{old} is now {new}" in output.err
    assert (old_run / "metrics.jsonl").read_bytes().startswith(before)
    assert (old_run / "eval" / "before.json").read_bytes() == evaluation  # read, not made again
    expected = lines(RECORDED / "whole_metrics.jsonl")
    for record, other in zip(lines(old_run / "metrics.jsonl"), expected, strict=True):
        known = {key: value for key, value in record.items() if key in other}  # "truncated" is newer
        assert known == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True)  # bits differ between processors


def test_a_resumed_old_run_has_the_new_names_from_then_on(old_run, capsys):
    train.run_command(["--resume", str(old_run), "--steps=3"])
    written = yaml.safe_load((old_run / "config.yaml").read_text())
    for old, new in RENAMED.items():
        group = old.split(".")[0]
        assert new.split(".")[1] in written[group]
        assert old.split(".")[1] not in written[group]
    capsys.readouterr()
    train.run_command(["--resume", str(old_run), "--steps=4"])
    assert "is now" not in capsys.readouterr().err


def test_a_changed_field_may_be_allowed_by_its_old_name(old_run):
    command = ["--resume", str(old_run), "--steps=3", "--critic.gamma=1.0"]
    with pytest.raises(Exception, match=r"critic\.gamma was 0\.99 in this run"):
        train.run_command(command)
    train.run_command([*command, "--allow-change=critic.discount"])
    assert len(lines(old_run / "metrics.jsonl")) == 3
