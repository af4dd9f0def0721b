"""`python -m repo.report`: writes a report again and elsewhere, and refuses what it cannot report."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from repo.common.errors import UserError
from repo.report import run_command
from repo.reporting.after_run import draw_report
from repo.reporting.document import write_report
from repo.reporting.run_history import read
from repo.session import next_commands
from tests.support.recorded import write_run

pytest.importorskip("matplotlib")


def test_a_report_is_written_again_and_elsewhere(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    run_command([str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report' / 'index.html'}\n"
    out = shutil.copytree(run / "report", tmp_path / "elsewhere")
    (out / "notes.txt").write_text("mine")
    (out / "reward.png").write_bytes(b"old")
    run_command([str(run), f"--out={out}"])
    assert (out / "notes.txt").read_text() == "mine"
    for name in ("index.html", "reward.png"):
        assert (out / name).read_bytes() == (run / "report" / name).read_bytes()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_pictures_beside_no_report_are_not_replaced(tmp_path):
    run = write_run(tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (mine / "cost.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"cost.png exists and is not a report's; choose another folder"):
        write_report(run, mine)
    assert sorted(p.name for p in mine.iterdir()) == ["cost.png", "notes.txt"]
    assert (mine / "cost.png").read_bytes() == b"mine"


def test_what_cannot_be_reported_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    run = write_run(tmp_path / "run")
    other = tmp_path / "site"
    other.mkdir()
    (other / "index.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match=r"index.html exists and is not a report's; choose another folder"):
        write_report(run, other)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        write_report(run, tmp_path / "file" / "below")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("algorithm: {")
    with pytest.raises(UserError, match=r"config.yaml is damaged"):
        write_report(run)
    (run / "config.yaml").write_text(config)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], '{"step"\n', *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 3"):
        write_report(run)
    (run / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 1"):
        write_report(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no metrics yet"):
        write_report(run)


def test_without_matplotlib_the_command_says_what_to_install(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        write_report(run)


def test_a_damaged_evaluation_is_named(tmp_path):
    run = write_run(tmp_path / "run", held_out=2)
    (run / "eval" / "after.json").write_text('{"summary": {}, "responses": [{"id": "a"}]}')
    with pytest.raises(UserError, match=r"after.json is damaged: response 0 lacks"):
        write_report(run)
    texts, numbers = ("id", "category", "prompt", "response"), ("tokens", "reward", "cost")
    nothing = [dict.fromkeys(texts, "") | dict.fromkeys(numbers)]
    (run / "eval" / "after.json").write_text(json.dumps({"summary": {}, "responses": nothing}))
    with pytest.raises(UserError, match=r"after.json is damaged: response 0 has no reward or no cost"):
        write_report(run)
    for odd in (
        "{",
        "[]",
        '{"summary": {"overall": {}}}',
        '{"responses": []}',
        '{"responses": 3}',
        '{"responses": [3]}',
    ):
        (run / "eval" / "after.json").write_text(odd)
        with pytest.raises(UserError, match=r"after.json is damaged"):
            write_report(run)


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        (lambda i: {} if i else {"judge_safe": True}, "judge_safe"),
        (lambda _: {"tokens": None}, "not a number"),
        (lambda _: {"judge_safe": "yes"}, "not a number"),
        (lambda _: {"response": None}, "response 0 has no text as its response"),
        (lambda i: {"id": "abbb"[i]}, "equally many responses of every prompt"),
    ],
)
def test_responses_that_say_nothing_are_a_sentence(tmp_path, change_of, said):
    run = write_run(tmp_path / "run", held_out=4)
    path = run / "eval" / "after.json"
    found = json.loads(path.read_text())
    found["responses"] = [r | change_of(i) for i, r in enumerate(found["responses"])]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"after.json is damaged: .*{said}"):
        read(run)


def test_a_finished_run_prints_the_path_of_its_report(tmp_path, monkeypatch):
    run, text = write_run(tmp_path / "run"), io.StringIO()
    monkeypatch.setattr("repo.reporting.document.write_report", lambda run: run / "report" / "index.html")
    assert draw_report(run, Console(file=text, width=400))
    assert text.getvalue() == f"report: {run / 'report' / 'index.html'}\n"
    assert "repo.report" in next_commands(run, False)
    assert "repo.report" not in next_commands(run, True)


def test_a_report_that_cannot_be_drawn_does_not_lose_the_run(tmp_path, monkeypatch):
    run, text = write_run(tmp_path / "run"), io.StringIO()
    console = Console(file=text, width=400)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert not draw_report(run, console)
    monkeypatch.setattr("repo.reporting.document.read", lambda *_: 1 / 0)
    assert not draw_report(run, console)
    assert text.getvalue().splitlines() == [
        "no report was drawn: a report with figures needs the package matplotlib: pip install matplotlib",
        "no report was drawn: ZeroDivisionError: division by zero",
    ]
    assert not (run / "report").exists()


def test_the_command_prints_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "repo.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: RUN: {tmp_path} is not a run folder (it has no config.yaml)"
