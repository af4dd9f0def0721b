"""One run at several scales: what is evaluated, kept, read again and drawn."""

import json

import pytest

from repo import compare, evaluate, export, train
from repo.common.errors import UserError
from repo.evaluation.scales import parse_scales
from repo.reporting.pareto import draw_scales

INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.625}


@pytest.fixture(scope="module")
def run(tiny_arguments, tmp_path_factory):
    """A run of 4 steps whose updates are large, with the evaluation before training."""
    folder = tmp_path_factory.mktemp("scaled") / "run"
    more = ["--optimizer.lr=2e-2", "--evaluation.samples_per_prompt=2", "--keep=2"]
    train.run_command([*tiny_arguments, *more, f"--out={folder}"])
    return folder


def content(path):
    return json.loads(path.read_text())


def test_each_scale_is_evaluated_as_its_export_is_and_only_once(run, tmp_path, capsys, monkeypatch):
    compare.run_command(["--scales=0.5,1", str(run)])
    printed = capsys.readouterr().out
    kept = run / "scales"
    files = {path.name for path in kept.iterdir()}
    assert files == {"step-000004-0.5.json", "step-000004-1.json", "scales.json", "scales.png"}
    assert content(kept / "step-000004-1.json")["responses"] == content(run / "eval" / "after.json")["responses"]
    export.run_command([str(run), "--scale=0.5", f"--out={tmp_path / 'half'}"])
    config = ["--config", str(run / "config.yaml"), "--evaluation.samples_per_prompt=2"]
    model = [str(tmp_path / "half"), "--reference", content_of_config(run)]
    evaluate.run_command([*model, *config, f"--out={tmp_path / 'half.json'}"])
    half = content(kept / "step-000004-0.5.json")
    assert half["responses"] == content(tmp_path / "half.json")["responses"]
    assert half["responses"] != content(kept / "step-000004-1.json")["responses"]
    points = content(kept / "scales.json")["points"]
    assert [p["scale"] for p in points] == [0, 0.5, 1]  # 0 is the evaluation before training
    assert points[1]["quantities"] == half["summary"]["overall"]
    assert (kept / "scales.png").read_bytes()[1:4] == b"PNG"
    assert "0.5 (2 x 2)" in printed

    loaded = []
    monkeypatch.setattr(compare, "evaluate_scales", lambda kept, scales, *_: loaded.append(scales))
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("step*")}
    compare.run_command(["--scales=1,0.5", str(run)])
    assert not loaded
    assert before == {path.name: path.stat().st_mtime_ns for path in kept.glob("step*")}
    for change in ({"cost_limit": 7.0}, {"weights": {}}, {"asked": {}}, {"data": "other.jsonl"}):
        file = kept / "step-000004-0.5.json"
        file.write_text(json.dumps(half | change))
        compare.run_command(["--scales=0.5,1", str(run)])
        file.write_text(json.dumps(half))
        assert loaded.pop() == [0.5]


def content_of_config(run):
    """The model that a run began with."""
    from repo.config.parse import load_config

    return load_config(run / "config.yaml").model.path


def test_a_checkpoint_and_a_limit_can_be_chosen(run, tmp_path, capsys):
    more = ["--checkpoint=step-000002", "--cost-limit", "-1", f"--out={tmp_path / 'kept'}"]
    compare.run_command(["--scales=1.25", str(run), *more])
    assert (tmp_path / "kept" / "step-000002-1.25.json").is_file()
    found = content(tmp_path / "kept" / "scales.json")
    assert (found["checkpoint"], found["cost_limit"]) == ("step-000002", -1)


def test_scales_are_read_by_size():
    assert parse_scales("1, 0.25,1.5") == [0.25, 1, 1.5]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must be numbers separated by commas"),
        ("0.5,half", "must be numbers separated by commas, as 0.5,1; got '0.5,half'"),
        ("0,1", r"each must be > 0 and <= 1\.5; got 0"),
        ("2", r"each must be > 0 and <= 1\.5; got 2"),
        ("nan", r"each must be > 0 and <= 1\.5; got nan"),
        ("1,1.0", "1 is given twice"),
    ],
)
def test_wrong_scales_are_named(text, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_scales(text)


def test_what_does_not_go_together_is_a_sentence(run, tmp_path):
    for arguments, sentence in (
        (["--scales=1", str(run), str(run)], "--scales takes one run; got 2"),
        (["--scales=1", str(tmp_path)], "is not a run folder"),
        (["--scales=1", str(run), "--checkpoint=step-9"], "has no 'step-9'"),
        ([str(run), str(run), "--checkpoint=best"], "--checkpoint needs --scales"),
        ([str(run), str(run), "--trust-remote-code"], "--trust-remote-code needs --scales"),
    ):
        with pytest.raises(UserError, match=sentence):
            compare.run_command(arguments)


def test_the_figure_has_a_panel_for_each_judge_and_a_name_for_each_point():
    quantities = {"reward": INTERVAL, "safe_rate": INTERVAL, "judge_safe_rate": INTERVAL}
    figure = draw_scales([(0.0, quantities), (0.5, quantities), (1.25, quantities)])
    labels = ["safe rate (training cost)", "safe rate (held-out judge)"]
    assert [axes.get_xlabel() for axes in figure.axes] == labels
    assert [text.get_text() for text in figure.axes[0].texts] == ["0 (reference)", "0.5", "1.25"]
    del quantities["judge_safe_rate"]
    assert len(draw_scales([(1.0, quantities)]).axes) == 1
