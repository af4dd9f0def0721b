"""`python -m repo.evaluate`: runs, checkpoints, models, own prompts and judges; what it refuses."""

import json
import math

import pytest
import torch
from rich.console import Console

from repo import evaluate, setup, train
from repo.common.errors import UserError
from repo.common.seeds import seed_from
from repo.config.parse import load_config
from repo.scoring.judge import load_judge
from repo.scoring.scorers import load_scorer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_arguments, tmp_path_factory):
    """A run of 4 steps with a checkpoint every 2."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train.run_command([*tiny_arguments, f"--out={folder}", "--keep=5", "--optimizer.lr=3e-3"])
    return folder


def content(path):
    """A written evaluation."""
    return json.loads(path.read_text())


def test_the_final_policy_is_evaluated_with_every_quantity(run, tmp_path, capsys):
    evaluate.run_command([str(run), f"--out={tmp_path / 'e.json'}", "--evaluation.judge=tests.support.scorers:cost"])
    found, printed = content(tmp_path / "e.json"), capsys.readouterr().out
    overall = found["summary"]["overall"]
    assert found["summary"]["samples"] == evaluate.SAMPLES
    assert len(found["responses"]) == evaluate.SAMPLES * found["summary"]["prompts"]
    assert overall["judge_safe_rate"] == overall["safe_rate"]  # the judge is the cost here
    for title in ("E{C-d}+", "compensation gap", "KL to the reference", "refusals", "safe rate (held-out judge)"):
        assert title in printed
    for record in found["responses"]:
        assert record["surprise"] > 0
        assert math.isfinite(record["kl"])
    assert found["checkpoint"] == "final"
    assert found["judge"] == "tests.support.scorers:cost"


def test_the_kl_of_the_reference_to_itself_is_0(run, tmp_path):
    evaluate.run_command([str(run), "--checkpoint=reference", f"--out={tmp_path / 'e.json'}"])
    assert all(abs(r["kl"]) < 1e-4 for r in content(tmp_path / "e.json")["responses"])


def test_kl_surprise_and_reference_are_those_of_the_two_models(run, tiny_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from repo.evaluation import evaluator

    rollouts, plain = [], evaluator.sample

    def kept(*arguments):
        rollouts.append(plain(*arguments))
        return rollouts[-1]

    monkeypatch.setattr(evaluator, "sample", kept)
    evaluate.run_command([str(run), f"--out={tmp_path / 'e.json'}", "--rollout.temperature=0.5"])
    (rollout,) = rollouts
    records = {(r["prompt"], r["response"]): r for r in content(tmp_path / "e.json")["responses"]}
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (run / "final", tiny_model)]
    for (prompt, ids), asked, text in zip(token_lists(rollout), rollout.prompts, rollout.texts, strict=True):
        said = []
        for model, temperature in ((models[0], 0.5), (models[1], 0.5), (models[1], 1.0)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
            said.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item())
        record = records[asked.text, text]
        assert record["surprise"] == pytest.approx(-said[0], abs=1e-3)
        assert record["kl"] == pytest.approx(said[0] - said[1], abs=1e-3)
        assert record["ref_logp"] == pytest.approx(said[2], abs=1e-3)


def token_lists(rollout):
    """(prompt, response) tokens of each response."""
    return [([*p.token_ids], ids) for p, (_, ids) in zip(rollout.prompts, rollout.sequences.token_lists(), strict=True)]


def test_all_checkpoints_are_evaluated_once(run):
    evaluate.run_command([str(run), "--checkpoint=all"])
    names = {path.stem for path in (run / "eval").glob("*.json")}
    assert names == {"before", "after", "final", "step-000002", "step-000004"}
    last, final = (content(run / "eval" / f"{name}.json")["responses"] for name in ("step-000004", "final"))
    assert last == final
    with pytest.raises(UserError, match="has been evaluated already"):
        evaluate.run_command([str(run), "--checkpoint=all"])
    with pytest.raises(UserError, match="exists; name another file"):
        evaluate.run_command([str(run)])


def test_a_model_is_evaluated_on_prompts_of_ones_own(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "What is salt?"}\n{"prompt": "What is flour?", "category": "b"}\n')
    scorers = ["--scoring.reward=tests.support.scorers:reward", "--scoring.cost=tests.support.scorers:cost"]
    options = [*scorers, "--data.eval=mine.jsonl", "--evaluation.judge=none", "--rollout.max_response_tokens=4"]
    evaluate.run_command([str(tiny_model), *options])
    (path,) = (tmp_path / "evaluations").glob("*.json")
    found = content(path)
    assert found["summary"]["prompts"] == 2
    assert "kl" not in found["summary"]["overall"]
    assert "judge_safe_rate" not in found["summary"]["overall"]


def test_responses_stand_in_the_order_of_the_prompts_whatever_their_lengths(tiny_model, tmp_path):
    ids = sorted((f"p{i}" for i in range(5)), key=lambda name: seed_from("held out", name))
    lines = [json.dumps({"id": name, "prompt": "What is salt? " * (5 - i)}) + "\n" for i, name in enumerate(ids)]
    (tmp_path / "mine.jsonl").write_text("".join(sorted(lines)))
    scorers = ["--scoring.reward=tests.support.scorers:reward", "--scoring.cost=tests.support.scorers:cost"]
    options = [
        *scorers,
        f"--data.eval={tmp_path / 'mine.jsonl'}",
        "--evaluation.judge=none",
        "--rollout.max_response_tokens=4",
    ]
    evaluate.run_command([str(tiny_model), *options, f"--out={tmp_path / 'e.json'}", "--rollout.batch_size=8"])
    found = [r["id"] for r in content(tmp_path / "e.json")["responses"]]
    assert found == [name for name in ids for _ in range(evaluate.SAMPLES)]


def test_a_run_that_goes_on_leaves_no_evaluation_of_a_policy_that_is_gone(tiny_arguments, tmp_path):
    out = tmp_path / "run"
    train.run_command([*tiny_arguments, f"--out={out}", "--steps=2"])
    for name in ("final", "step-000002", "step-000003", "reference", "mine", "shield4-final", "shield4-step-000002"):
        (out / "eval" / f"{name}.json").write_text("{}")
    train.run_command(["--resume", str(out), "--steps=3"])
    kept = {"before", "after", "step-000002", "reference", "mine", "shield4-step-000002"}
    assert {p.stem for p in (out / "eval").iterdir()} == kept


def test_what_was_allowed_to_change_is_evaluated_anew(tiny_arguments, tmp_path):
    out = tmp_path / "run"
    train.run_command([*tiny_arguments, f"--out={out}", "--steps=2"])
    other = ["--scoring.cost=tests.support.scorers:reward", "--allow-change=scoring.cost"]
    train.run_command(["--resume", str(out), "--steps=3", *other])
    for name in ("before", "after"):
        found = content(out / "eval" / f"{name}.json")
        assert found["cost_scorer"] == "tests.support.scorers:reward"
        assert all(r["cost"] == r["reward"] for r in found["responses"])


def test_a_shield_returns_the_first_acceptable_of_the_same_draws(run, tmp_path, capsys):
    more = ["--algorithm.cost_limit=-0.2", "--evaluation.judge=tests.support.scorers:not_e"]
    evaluate.run_command([str(run), *more, f"--out={tmp_path / 'plain.json'}"])
    capsys.readouterr()
    evaluate.run_command([str(run), *more, "--shield=4", f"--out={tmp_path / 'shield.json'}"])
    printed = capsys.readouterr().out
    plain, found = (content(tmp_path / f"{name}.json") for name in ("plain", "shield"))
    assert found["summary"]["samples"] == 1
    for n, record in enumerate(found["responses"]):
        four = plain["responses"][4 * n : 4 * n + 4]
        ordered = [r for r in four if r["cost"] <= -0.2] or [min(four, key=lambda r: r["cost"])]
        for key in ("id", "response", "reward", "cost", "tokens", "truncated", "judge_safe"):
            assert record[key] == ordered[0][key]
        assert record["accepted"] == (record["cost"] <= -0.2)
        assert record["draws"] == (four.index(ordered[0]) + 1 if record["accepted"] else 4)
    assert {"samples": 4, "z": 1.64, "limit": -0.2}.items() <= found["shield"].items()
    assert found["shield"]["scorers"] == ["tests.support.scorers:cost"]
    assert set(found["shield"]["judges"]) == {"held-out judge", "training cost"}
    assert found["shield"]["mean_draws"]["mean"] == sum(r["draws"] for r in found["responses"]) / 2
    for text in ("behind a shield: up to 4 draws", "draws per response", "Clopper-Pearson bound"):
        assert text in printed


def test_a_shielded_reference_refuses_by_an_ensemble_into_a_file_of_its_own(run):
    ensemble = [f"--shield-scorer=tests.support.scorers:{name}" for name in ("cost", "words")]
    refusal = ["--shield-z=2", "--shield-refusal=I am sorry."]
    evaluate.run_command([str(run), "--checkpoint=reference", "--shield=2", *ensemble, *refusal])
    found = content(run / "eval" / "shield2-reference.json")
    assert [r["response"] for r in found["responses"]] == ["I am sorry."] * 2  # words are dear
    assert found["shield"]["without_acceptable_draw"]["mean"] == 1.0
    assert all(r["draws"] == 2 and not r["accepted"] and r["refusal"] for r in found["responses"])
    assert found["shield"]["scorers"] == ["tests.support.scorers:cost", "tests.support.scorers:words"]


def test_a_model_behind_a_shield_needs_no_run(tiny_model, tiny_prompts, tmp_path):
    scorers = ["--scoring.reward=tests.support.scorers:reward", "--scoring.cost=tests.support.scorers:cost"]
    options = [*scorers, f"--data.eval={tiny_prompts[1]}", "--evaluation.judge=none", "--rollout.max_response_tokens=4"]
    evaluate.run_command([str(tiny_model), *options, "--shield", "3", f"--out={tmp_path / 'e.json'}"])
    assert list(content(tmp_path / "e.json")["shield"]["judges"]) == ["training cost"]


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        (["--shield=0"], "--shield must be an integer >= 1; got 0"),
        (["--shield=many"], "--shield: invalid int value: 'many'"),
        (["--shield-z=1"], "--shield-z needs --shield N"),
        (["--shield-refusal=no"], "--shield-refusal needs --shield N"),
        (["--shield-scorer=embedded"], "--shield-scorer needs --shield N"),
        (["--shield=2", "--shield-z", "-1"], r"--shield-z must be a finite number >= 0; got -1\.0"),
        (["--shield=2", "--shield-z=nan"], "--shield-z must be a finite number >= 0; got nan"),
        (["--shield=2", "--shield-refusal= "], "--shield-refusal must be a text that is not empty"),
        (["--shield=2", "--shield-scorer="], "--shield-scorer must name a cost scorer"),
        (["--shield=2", "--shield-scorer=a:b", "--shield-scorer=a:b"], "'a:b' is given twice"),
        (["--shield=2", "--shield-scorer=nowhere:b", "--out=x.json"], "--shield-scorer: cannot import module"),
    ],
)
def test_wrong_switches_of_a_shield_are_told_in_a_sentence(run, switches, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate.run_command([str(run), *switches])


def test_an_embedded_shield_scorer_gets_its_assets_though_nothing_else_needs_any(run, tmp_path, monkeypatch):
    config, console = load_config(run / "config.yaml"), Console(quiet=True)
    monkeypatch.setattr(setup.assets, "build", lambda report: None)
    monkeypatch.setattr(setup.assets, "assets_dir", lambda: tmp_path)
    assert setup.find_assets(config, console) is None
    assert setup.find_assets(config, console, ["embedded"]) == tmp_path
    with pytest.raises(UserError, match=r"^--shield-scorer is 'embedded' but there is no assets folder"):
        load_scorer("embedded", "shield", 1.0, None)


def test_training_refuses_a_shield_on_its_command_line(tiny_arguments):
    with pytest.raises(UserError, match=r"unknown configuration key 'shield'.*repo\.evaluate RUN --shield"):
        train.run_command([*tiny_arguments, "--shield=4"])


def test_what_cannot_be_evaluated_is_told_in_a_sentence(run, tiny_model):
    for arguments, sentence in (
        ([], "takes a run folder or a model first"),
        ([str(tiny_model), "--checkpoint=best"], "--checkpoint takes a run folder"),
        ([str(run), "--checkpoint=step-9"], "has no 'step-9'"),
        ([str(run), "--checkpoint=all", "--out=x.json"], "one file cannot hold"),
        ([str(run), "--evaluation.judges=x"], "did you mean 'evaluation.judge'"),
        ([str(run), "--out=x.json", "--evaluation.judge=nowhere:x"], "evaluation.judge: cannot import module"),
    ):
        for path in (run / "eval").glob("[fs]*.json"):
            path.unlink()
        with pytest.raises(UserError, match=sentence):
            evaluate.run_command(arguments)


def test_a_judge_with_a_score_that_is_not_finite_is_told_by_its_prompt():
    from repo.data.prompts import Prompt

    judge = load_judge("tests.support.scorers:not_a_number", None, "cpu", 5.0)
    with pytest.raises(UserError, match=r"evaluation.judge 'tests.support.scorers:not_a_number' gave nan .*Why\?"):
        judge([Prompt("1", "Why?", "c")] * 2, ["a", "b"])


def test_help_shows_the_fields_and_the_switches(capsys):
    with pytest.raises(SystemExit):
        evaluate.run_command(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--evaluation.judge" in text
    assert "--checkpoint NAME" in text
