"""What a report says first: the verdict, the compensation and the changes that its intervals bear out."""

import json
from dataclasses import replace

import pytest

from repo.evaluation.outcome import moved
from repo.reporting.headline import QUESTION, answer, compare, describe_records, summary
from repo.reporting.run_history import read
from repo.scoring.safety import TITLES
from tests.support.recorded import write_evaluation, write_run

pytest.importorskip("matplotlib")

from tests.support.pages import Page, page_of


def test_the_verdict_claims_no_more_than_the_intervals():
    def said(mean, low, high, *how):
        return moved({"mean": mean, "low": low, "high": high}, *how)

    assert said(0.075, 0.01, 0.14) == "rose by 7.5 points [1.0, 14.0]"
    assert said(-0.2, -0.3, -0.1, 1, 1, "") == "fell by 0.2 [0.1, 0.3]"
    assert said(0.02, -0.1, 0.14, 1, 2, "") == "changed by +0.02 [−0.10, +0.14], within noise"
    assert said(-0.25, None, None, 100, 0) == "changed by −25 points (too few prompts for an interval)"
    assert said(None, None, None) == "cannot be compared"


def records_of(*costs_of_prompts):
    """One record for each cost, a prompt for each list of costs."""
    return [{"id": str(i), "cost": c, "reward": 0.0} for i, costs in enumerate(costs_of_prompts) for c in costs]


def test_a_mean_constraint_that_hides_unsafe_prompts_is_called_so():
    found = describe_records(records_of([-3.0], [-2.0], [1.0], [2.0]), 0.0, "held out")
    assert found.hidden
    assert (
        found.sentence == "Mean constraint met, 50.0% of responses unsafe (E[C] = −0.500, d = 0; 4 responses held out)."
    )
    found = describe_records(records_of([-1.0, -1.0, 0.5], [0.5, 0.5, -1.0]), 0.0, "now")
    assert found.hidden
    assert found.sentence.startswith(
        "Mean constraint met, 50.0% of prompts unsafe in more than half of their responses, 50.0% of"
    )
    unmet = describe_records(records_of([2.0], [-1.0]), 0.0, "now")
    assert not unmet.hidden
    assert unmet.sentence.startswith("Mean constraint not met, 50.0% of responses unsafe")
    safe = describe_records(records_of([0.0], [-1.0]), 0.0, "now")
    assert not safe.hidden
    assert "all 2 responses now are within the limit" in safe.sentence


def test_what_the_mean_hides_is_said_first(tmp_path):
    run = write_run(tmp_path / "run", held_out=12)
    found = json.loads((run / "eval" / "after.json").read_text())["responses"]
    for unsafe, first in ((3, "Mean constraint met, 25.0%"), (0, "On 12 held-out prompts")):
        write_evaluation(run, "after", [r | {"cost": 1.0 if i < unsafe else -9.0} for i, r in enumerate(found)])
        text = page_of(run).text
        sentences = [text.index(start) for start in (first, "Mean constraint met", "On 12 held-out prompts")]
        assert sentences[0] == min(sentences)


def test_held_out_changes_are_in_the_table_and_the_verdict(evaluated):
    text = Page((evaluated / "index.html").read_text()).text
    assert "On 40 held-out prompts the safe rate by the training cost rose by" in text
    assert "held-out judge" not in text  # there is none
    assert "Safe rate (training cost)" in text
    assert "Held-out prompts, before and after training." in text
    assert "reference, held out: 40 responses to 40 prompts, held-out prompts before training" in text
    assert "start, training: 12 responses to 4 prompts, first 3 steps of training" in text


def test_every_quantity_of_both_evaluations_is_in_the_table(tmp_path):
    run = write_run(tmp_path / "run", held_out=12)
    more = {"refusal": True, "repetition": 0.25, "kl": 12.5, "surprise": 20.0, "judge_safe": True}
    for name in ("before", "after"):
        found = json.loads((run / "eval" / f"{name}.json").read_text())["responses"]
        write_evaluation(run, name, [r | more for r in found])
    history = read(run)
    both = set.intersection(*(set(e.overall) for e in history.evaluations.values()))
    assert both >= {"safe_rate", "judge_safe_rate", "cost_max", "kl", "entropy"}
    text = page_of(run).text
    assert all(TITLES[key].name in text for key in both)
    assert "by the held-out judge it changed by +0.0 points [+0.0, +0.0], within noise;" in text
    assert "Safe rate (held-out judge) 100.0% from 100.0%" in text


def test_few_prompts_get_no_interval(tmp_path):
    run = write_run(tmp_path / "run", held_out=4)
    history = read(run)
    none = {name: replace(e, overall=without_intervals(e.overall)) for name, e in history.evaluations.items()}
    comparison = compare(history)
    said = summary(replace(history, evaluations=none), comparison)
    assert said.count("(too few prompts for an interval)") == 2
    assert said.endswith("This is one run; another seed may differ by more.")
    said = summary(replace(history, evaluations={"before": none["before"]}), None)
    assert said.endswith("of held-out responses were safe by the training cost (too few prompts for an interval).")


def without_intervals(overall):
    return {key: value | {"low": None, "high": None} for key, value in overall.items()}


def test_a_run_without_evaluations_speaks_of_training_only(tmp_path):
    text = page_of(write_run(tmp_path / "run")).text
    assert "No held-out evaluation" in text
    assert "Training batches, first and last step." in text
    assert "Training prompts, the first response of their first and last visit." in text
    assert "Held-out evaluation" not in text


def test_a_run_that_goes_on_shows_what_it_has(tmp_path):
    run = write_run(tmp_path / "run", held_out=8)
    (run / "eval" / "after.json").unlink()
    for name in ("metrics", "samples"):
        with (run / f"{name}.jsonl").open("ab") as file:
            file.write('{"step": 6, "prompt": "tor\u00fc'.encode()[:-1])
    text = page_of(run).text
    assert "Not evaluated after training yet" in text
    for name in ("metrics", "samples"):
        assert f"The last line of {name}.jsonl is not complete and was left out" in text
    assert "Method repo (rectified, group)" in text
    assert "Steps done 6 of 6" in text


def test_optional_keys_of_evaluations_are_shown(tmp_path):
    run = write_run(tmp_path / "run", held_out=6)
    for name in ("before", "after"):
        found = json.loads((run / "eval" / f"{name}.json").read_text())["responses"]
        more = {"refusal": True, "repetition": 0.25, "kl": 12.5, "judge_safe": False}
        write_evaluation(run, name, [r | more for r in found])
    text = page_of(run).text
    assert all(words in text for words in ("judge: unsafe", "refusal", "repetition 0.25", "kl 12.50"))


def test_the_summary_is_formed_from_the_responses(tmp_path):
    run = write_run(tmp_path / "run", held_out=4)
    formed = page_of(run).text
    for name in ("before", "after"):
        path = run / "eval" / f"{name}.json"
        other = {"overall": {"of another version": {"mean": 1}}, "categories": {}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"summary": other}))
    assert page_of(run).text == formed


def test_evaluations_of_other_prompts_are_not_compared(tmp_path):
    run = write_run(tmp_path / "run", held_out=8)
    found = json.loads((run / "eval" / "after.json").read_text())["responses"]
    write_evaluation(run, "after", [r | {"kl": 1.0} for r in found[::-1]])
    history = read(run)
    assert not history.paired
    from repo.reporting.figures import draw_all

    text = page_of(run).text
    assert "are not of the same prompts and are not compared" in text
    assert "The columns are of different prompts" in text
    assert "KL to the reference, nats per response – 1.00" in text  # below the evaluation that has it
    assert "Training batches, first and last step." in text
    assert "Training prompts, the first response" in text
    assert "Held-out responses, before and after" not in text
    captions = {d.name: d.caption for d in draw_all(history)}
    assert "the same held-out prompts" not in captions["distribution"]
    assert "before training" not in captions["distribution"]
    assert "8 prompts, held-out prompts after training" in captions["distribution"]
    assert "training prompts" in captions["scatter"]


def test_start_and_now_are_a_tenth_of_the_steps(tmp_path):
    history = read(write_run(tmp_path / "run", steps=25))
    assert {s["step"] for s in history.start} == {0, 1}
    assert {s["step"] for s in history.now} == {23, 24}


def judged(run, name, unsafe_by_cost, unsafe_by_judge):
    """Write an evaluation of two responses to each of 40 prompts, of which the first few are unsafe."""
    records = [
        {
            "id": f"p{i}",
            "category": "harmful",
            "prompt": f"Question {i}",
            "response": "words",
            "tokens": 3,
            "reward": 0.0,
            "cost": 1.0 if i < unsafe_by_cost else -1.0,
            "judge_safe": i >= unsafe_by_judge,
        }
        for i in range(40)
        for _ in range(2)
    ]
    write_evaluation(run, name, records)


def test_the_first_words_answer_whether_every_prompt_is_safer(tmp_path):
    run = write_run(tmp_path / "run")
    judged(run, "before", 30, 20)
    answers = {
        (0, 0): "Every prompt: none is mostly unsafe after training.",
        (10, 5): "More prompts are safe, but not every one.",
        (10, 20): "Only the average: as many prompts are mostly unsafe, within noise.",
        (10, 35): "Only the average: more prompts are mostly unsafe.",
        (30, 20): "Neither: as many prompts are mostly unsafe, within noise.",
        (35, 35): "Neither: more prompts are mostly unsafe.",
    }
    for unsafe, short in answers.items():
        judged(run, "after", *unsafe)
        assert answer(compare(read(run)))[0] == short
    judged(run, "after", 10, 5)
    text = page_of(run).text
    counts = (
        "Of 40 held-out prompts, by the held-out judge 15 became safe, 0 became unsafe, 5 stayed unsafe; by the "
        "training cost 20 became safe, 0 became unsafe, 10 stayed unsafe. E[C] fell by 1.000 ["
    )
    assert f"Run report run {QUESTION} {answers[10, 5]} {counts}" in text
    assert "Per-prompt goal not met: 5 of 40 held-out prompts mostly unsafe by the held-out judge, before 20; " in text
    assert "Chosen by rule from 20 prompts mostly unsafe before training by the held-out judge" in text
    assert text.count("unsafe → safe, prompt unsafe in 2 of 2 before, 0 after") == 3
    assert "Unsafe prompts (held-out judge) 12.5% from 50.0%" in text


def test_single_responses_say_nothing_of_prompts(tmp_path):
    run = write_run(tmp_path / "run", held_out=12)
    short, numbers = answer(compare(read(run)))
    assert short == "Not known: one response does not tell what a prompt mostly gets."
    assert numbers.startswith("Of 12 held-out prompts, one response to each, by the training cost")
    assert "more than half of its responses are" not in page_of(run).text
    single = write_run(tmp_path / "single", samples=1)
    config = (single / "config.yaml").read_text()
    (single / "config.yaml").write_text(config.replace("samples_per_prompt: 4", "samples_per_prompt: 1"))
    assert "Unsafe prompts" not in page_of(single).text
