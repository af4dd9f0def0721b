"""The write_report of a run: self-contained, escaped, honest about what it is over, and readable in a browser."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from repo.common.errors import UserError
from repo.report import run_command
from repo.reporting.document import assemble, grouped, write_report
from repo.reporting.headline import Comparison, change, compare, describe_records, verdict
from repo.reporting.page import escaped, number
from repo.reporting.prompt_history import ledger
from repo.reporting.run_history import read
from repo.scoring.safety import TITLES
from tests.loop.recorded import write_evaluation, write_lines, write_run

pytest.importorskip("matplotlib")

FIGURES = "reward cost distribution cumulative safe_rate describe_records penalty scatter policy training".split()
HOSTILE = (
    "<script>alert(1)</script></script><img src=x onerror=alert(2)> \"quoted\" 'single' ]]> &amp; \ud800 \x00 \u202e"
)
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, visible text, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(run):
    """The write_report of a run but for its figures, parsed."""
    found = Page(assemble(read(run), []))
    assert not found.open
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A write_report with everything in it."""
    run = write_run(tmp_path_factory.mktemp("runs") / "evaluated", steps=30, held_out=40)
    return write_report(run).parent


def rewrite(run, name, change_of):
    """Edit the records of metrics.jsonl or samples.jsonl."""
    path = run / f"{name}.jsonl"
    write_lines(path, [r | change_of(r) for r in map(json.loads, path.read_text().splitlines())])


def test_every_figure_is_in_the_page_and_a_png_beside_it(evaluated):
    image = pytest.importorskip("PIL.Image")
    assert sorted(p.name for p in evaluated.iterdir()) == sorted(["index.html", *(f"{f}.png" for f in FIGURES)])
    for name in FIGURES:
        picture = image.open(evaluated / f"{name}.png")
        picture.load()
        assert picture.width > 600
    found = Page((evaluated / "index.html").read_text())
    assert sum(tag == "figure" for tag, _ in found.elements) == len(FIGURES)


def test_the_page_needs_nothing_but_itself(evaluated):
    text = (evaluated / "index.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)|<link|<iframe|<object|<img", text)
    for _, attributes in Page(text).elements:
        assert all(value.startswith("#") for key, value in attributes.items() if key in ("src", "href", "xlink:href"))
    assert "default-src 'none'" in text


def test_figures_take_their_colours_from_the_page(evaluated):
    text = (evaluated / "index.html").read_text()
    figures = "".join(re.findall(r"<figure>.*?</figure>", text, re.S))
    assert not re.search(r"#[0-9a-f]{6}\b", figures)
    used = set(re.findall(r"var\((--\w+)\)", figures))
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S))
    assert used <= light == dark


def test_ids_are_unique_and_references_lead_to_them(evaluated):
    text = (evaluated / "index.html").read_text()
    elements = Page(text).elements
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in elements if "href" in a} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)


def test_the_script_is_the_one_that_the_policy_of_the_page_allows(evaluated):
    text = (evaluated / "index.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_what_a_run_wrote_is_text_and_never_markup(tmp_path):
    run = write_run(tmp_path / "<b>run", held_out=4)
    hostile = dict.fromkeys(("prompt", "response", "category", "id"), HOSTILE)
    rewrite(run, "samples", lambda _: hostile)
    for name in ("before", "after"):
        records = json.loads((run / "eval" / f"{name}.json").read_text())["responses"]
        write_evaluation(run, name, [r | hostile for r in records])
    found = page_of(run)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"img", "b"}
    assert sum(tag == "script" for tag, _ in found.elements) == 1
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    assert "<script>alert(1)</script></script><img src=x onerror=alert(2)> \"quoted\" 'single' ]]> &amp;" in found.text
    assert "<b>run" in found.text


def test_escaping():
    assert escaped("<a href=\"x\" id='y'>&") == "&lt;a href=&quot;x&quot; id=&#x27;y&#x27;&gt;&amp;"
    assert escaped("a\ud83d\x00\x1bb\n\tc") == "a\ufffd\ufffd\ufffdb\n\tc"
    assert escaped("abcdef", 4) == "abcd… (2 more characters)"
    escaped(HOSTILE).encode()


def test_the_verdict_claims_no_more_than_the_intervals():
    def said(mean, low, high, *how):
        return change("x", {"mean": mean, "low": low, "high": high}, *how)

    assert said(0.075, 0.01, 0.14, 100, 1, " points") == "x rose by 7.5 points [1.0, 14.0]"
    assert said(-0.2, -0.3, -0.1, 1, 1) == "x fell by 0.2 [0.1, 0.3]"
    assert said(0.02, -0.1, 0.14, 1, 2) == "x changed by +0.02 [−0.10, +0.14], which includes no change"
    assert said(-0.25, None, None, 100, 0, " points") == "x changed by −25 points (too few prompts for an interval)"
    assert said(None, None, None, 1, 1) == "x cannot be compared"


def records(*costs_of_prompts):
    """One record for each cost, a prompt for each list of costs."""
    return [{"id": str(i), "cost": c, "reward": 0.0} for i, costs in enumerate(costs_of_prompts) for c in costs]


def test_a_mean_constraint_that_hides_unsafe_prompts_is_called_so():
    found = describe_records(records([-3.0], [-2.0], [1.0], [2.0]), 0.0, "held out")
    assert found.hidden
    assert (
        found.sentence == "Mean constraint met, 50.0% of prompts unsafe (E[C] = −0.500, d = 0; 4 responses held out)."
    )
    found = describe_records(records([-1.0, -1.0, 0.5], [0.5, 0.5, -1.0]), 0.0, "now")
    assert found.hidden
    assert found.sentence.startswith(
        "Mean constraint met, 50.0% of prompts unsafe in more than half of their responses, 50.0% of"
    )
    unmet = describe_records(records([2.0], [-1.0]), 0.0, "now")
    assert not unmet.hidden
    assert unmet.sentence.startswith("Mean constraint not met, 50.0% of prompts")
    safe = describe_records(records([0.0], [-1.0]), 0.0, "now")
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
    assert "by the held-out judge it changed by +0.0 points [+0.0, +0.0], which includes no change;" in text
    assert "Safe rate (held-out judge) 100.0% from 100.0%" in text


def test_few_prompts_get_no_interval(tmp_path):
    run = write_run(tmp_path / "run", held_out=4)
    history = read(run)
    none = {name: replace(e, overall=without_intervals(e.overall)) for name, e in history.evaluations.items()}
    changes = without_intervals(compare(history).changes)
    said = verdict(replace(history, evaluations=none), Comparison([], changes))
    assert said.count("(too few prompts for an interval)") == 2
    assert said.endswith("This is one run; another seed may differ by more.")
    said = verdict(replace(history, evaluations={"before": none["before"]}), None)
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
    assert "Steps done 6 of 6" in text


def test_a_single_step_is_enough(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    text = Page(write_report(run).read_text()).text
    assert "No prompt has been answered twice yet" in text
    (run / "samples.jsonl").write_text("")  # killed between the two files
    assert "There are no responses to check" in Page(write_report(run).read_text()).text


@pytest.mark.parametrize("algorithm", [{"method": "ppo"}, {"advantages": "gae", "mode": "split"}, {"cost_limit": 0.1}])
def test_other_methods_and_unknown_numbers(tmp_path, algorithm):
    run = write_run(tmp_path / "run", steps=12, **algorithm)
    unknown = {"reward_safe_mean": None, "kl": None, "reward_cost_grad_ratio": None, "cost_explained_variance": 0.1}
    rewrite(run, "metrics", lambda r: unknown if r["step"] % 3 else unknown | {"reward_cost_grad_ratio": 2.0})
    text = Page(write_report(run).read_text()).text
    assert "gradient norms, reward ÷ λ cost (log)" in text
    assert "cost critic" in text
    assert "KL to reference" not in text  # never known
    assert f"Cost limit d {algorithm.get('cost_limit', 0):g}" in text
    rectified = algorithm.get("method", "repo") == "repo"
    assert f"{'rectified' if rectified else 'unsafe'} responses, C > d (%)" in text
    assert ("rectified responses" in text) == rectified


def test_lengths_are_those_of_the_steps_or_counted_from_the_samples(tmp_path):
    from repo.reporting.figures import _metric

    run = write_run(tmp_path / "run")
    rewrite(run, "metrics", lambda r: {"length": 7.5 if r["step"] else None})
    np.testing.assert_allclose(_metric(read(run), "length"), [9.0, *[7.5] * 5])


def test_a_dollar_in_a_name_is_no_mathematics_in_a_figure():
    import matplotlib

    from repo.reporting.style import STYLE, legend, log_axis, panel

    with matplotlib.rc_context(STYLE):
        figure, axes = panel()
        axes.plot([0, 1], [0.1, 100], label=r"a $\frac{ b$")
        log_axis(axes)
        legend(axes)
        figure.draw_without_rendering()
        assert [t.get_text() for t in axes.get_legend().get_texts()] == [r"a $\frac{ b$"]
        assert {"0.1", "1", "10", "100"} <= {t.get_text() for t in axes.get_yticklabels()}


def test_costs_that_are_all_equal_or_extreme_are_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    for change_of in (lambda _: {"cost": 0.0}, lambda r: {"cost": 50.0 if r["step"] else -50.0}):
        rewrite(run, "samples", change_of)
        from repo.reporting.figures import draw_all

        assert {"distribution", "cumulative", "scatter"} <= {d.name for d in draw_all(read(run))}


def test_samples_without_a_score_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run")
    rewrite(run, "samples", lambda r: {"cost": None} if r["step"] == 2 else {})
    text = page_of(run).text
    assert "4 samples without a reward or a cost were left out." in text
    assert "4 training prompts in 10 visits" in text


def test_optional_keys_of_evaluations_are_shown(tmp_path):
    run = write_run(tmp_path / "run", held_out=6)
    for name in ("before", "after"):
        found = json.loads((run / "eval" / f"{name}.json").read_text())["responses"]
        more = {"refusal": True, "repetition": 0.25, "kl": 12.5, "judge_safe": False}
        write_evaluation(run, name, [r | more for r in found])
    text = page_of(run).text
    assert all(words in text for words in ("judge: unsafe", "refusal", "repetition 0.25", "kl 12.50"))


def sample(step, identity, *costs):
    return [
        {
            "step": step,
            "id": identity,
            "category": "c",
            "prompt": f"p {identity}",
            "response": "r",
            "reward": 0.0,
            "cost": c,
        }
        for c in costs
    ]


def test_the_ledger_of_a_history_done_by_hand():
    lines = [
        *sample(0, "a", 1.0, 3.0),  # unsafe
        *sample(0, "b", -1.0, 2.0),  # half is not more than half
        *sample(1, "a", -1.0, 0.5),  # the limit is safe
        *sample(2, "a", 1.0, 2.0),
        *sample(3, "a", 1.5, -2.0, 0.75),  # two of three
        *sample(4, "a", -1.0, -1.0),
        *sample(4, "c", 9.0),
    ]
    c, b, a = ledger(lines, 0.5)
    assert (c.id, b.id, a.id) == ("c", "b", "a")
    assert [v.cost for v in a.visits] == pytest.approx([2.0, -0.25, 1.5, 0.25 / 3, -1.0])
    assert [v.unsafe for v in a.visits] == [True, False, True, True, False]
    assert (a.flips, b.flips, c.flips) == (3, 0, 0)
    assert a.unsafe_share == pytest.approx(6 / 11)
    # the last three visits: {0.5, 1.5}, {1.0, 0, 0.25}, {0, 0}
    assert a.hardness == pytest.approx(3.25 / 7)
    assert b.hardness == pytest.approx(0.75)


def test_pairs_are_grouped_by_what_happened():
    def pair(name, before, after, reward=0.0):
        return {"id": name, "cost": before, "reward": 0.0}, {"id": name, "cost": after, "reward": reward}

    pairs = [
        pair("a", 1, -1),
        pair("b", 2, -1),
        pair("c", 0, 1),
        pair("d", 1, 2),
        pair("e", -1, -1, 5.0),
        pair("f", 1, 3),
    ]
    found = {title: "".join(p[0]["id"] for p in chosen) for title, chosen in grouped(pairs, 0.0).items()}
    assert found["Unsafe → safe"] == "ba"
    assert found["Safe → unsafe"] == "c"
    assert found["Stayed unsafe"] == "fd"
    assert found["Reward changed most"][0] == "e"


@pytest.mark.slow
def test_a_thousand_steps_over_many_prompts_stay_small(tmp_path):
    run = write_run(tmp_path / "run", steps=1000, prompts=600, per_step=4, samples=4, held_out=200)
    rewrite(run, "samples", lambda r: {"prompt": "very long " * 400, "response": r["response"] * 40})
    index = write_report(run)
    assert index.stat().st_size <= 3_000_000
    text = Page(index.read_text()).text
    assert "The 200 hardest are listed, 400 are left out" in text
    assert "points are 250 of 1000 steps" in text


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
    with pytest.raises(UserError, match=r"cost.png exists and is not a write_report's; choose another folder"):
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
    with pytest.raises(UserError, match=r"index.html exists and is not a write_report's; choose another folder"):
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
        (lambda _: {"tokens": None}, "no number"),
        (lambda _: {"judge_safe": "yes"}, "no number"),
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


def test_few_responses_are_not_checked(tmp_path):
    text = page_of(write_run(tmp_path / "run", held_out=9)).text
    assert text.count("Too few responses to check: it takes 10 on each side.") == 2
    assert "Nothing found" not in text


def test_start_and_now_are_a_tenth_of_the_steps(tmp_path):
    history = read(write_run(tmp_path / "run", steps=25))
    assert {s["step"] for s in history.start} == {0, 1}
    assert {s["step"] for s in history.now} == {23, 24}


def test_running_means_skip_what_is_not_known():
    from repo.reporting.style import running_mean

    found = running_mean(np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan]), 2)
    np.testing.assert_allclose(found, [1.0, 1.0, 3.0, 4.0, 5.0, np.nan])
    assert np.isnan(running_mean(np.arange(8.0), 6)[:2]).all()


@pytest.mark.parametrize(
    "names", [("E[C]", "E{C−d}⁺", "limit d = -12.345"), ("start, training", "now, training", "reference, held out")]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_legends_stay_inside_their_figure(names, count):
    import matplotlib

    from repo.reporting.style import STYLE, legend, panel

    with matplotlib.rc_context(STYLE):
        figure, axes = panel()
        for name in names[:count]:
            axes.plot([0, 1], [0, 1], label=name)
        legend(axes)
        figure.draw_without_rendering()
        found = axes.get_legend().get_window_extent()
    assert found.x1 <= figure.bbox.x1
    assert axes.get_window_extent().width > 0.8 * figure.bbox.width


def test_a_cost_at_the_limit_falls_into_a_safe_bin():
    from repo.reporting.style import edges_of

    edges = edges_of(np.array([-2.0, 0.1, 3.0]), 0.1)
    assert 0.1 in edges
    assert edges[0] < -2.0
    assert edges[-1] >= 3.0


def test_numbers():
    assert [number(x) for x in (-1.234, -0.001, None, float("nan"))] == ["−1.23", "0.00", "–", "–"]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(folder, page):
    """(what the page looks like after its scripts have run, what it said on the console)."""
    arguments = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --dump-dom".split()
    command = [BROWSER, *arguments, f"--user-data-dir={folder / 'profile'}", "--window-size=390,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


SCRIPT = """<script>
const heads = [...document.querySelectorAll("#ledger th button")];
const column = (i) => [...document.querySelectorAll("#ledger tbody tr")].map((r) => r.cells[i].dataset.value);
const found = {hardest: column(7), wide: document.documentElement.scrollWidth - window.innerWidth};
heads[0].click();
found.prompts = column(0);
heads[1].click();
found.visits = column(1);
heads[1].click();
found.fewest = column(1);
found.sort = [...document.querySelectorAll("#ledger th")].map((h) => h.getAttribute("aria-sort"));
const filter = document.getElementById("filter");
filter.value = "Question 2 CHAT";
filter.dispatchEvent(new Event("input"));
found.shown = document.getElementById("count").textContent;
filter.value = "harmful question";
filter.dispatchEvent(new Event("input"));
found.harmful = document.getElementById("count").textContent;
document.title = JSON.stringify(found);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_in_a_browser_the_ledger_sorts_and_filters_and_nothing_complains(tmp_path):
    run = write_run(tmp_path / "run", steps=15, prompts=7, held_out=12)
    rewrite(run, "samples", lambda r: {"response": HOSTILE} if r["step"] % 2 else {})
    index = write_report(run)
    assert browse(tmp_path, index)[1] == []
    copy = tmp_path / "clicked.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", index.read_text())
    copy.write_text(text.replace("</body>", f"{SCRIPT}</body>"))
    shown, said = browse(tmp_path, copy)
    assert said == []
    found = json.loads(re.search(r"<title>(.*?)</title>", shown)[1])
    assert found["wide"] <= 0  # the page itself does not scroll sideways on a phone
    hardest, visits, fewest = ([float(x) for x in found[key]] for key in ("hardest", "visits", "fewest"))
    assert hardest == sorted(hardest, reverse=True)
    assert found["prompts"] == sorted(found["prompts"])
    assert visits == sorted(visits, reverse=True)
    assert fewest == sorted(visits)
    assert len(set(visits)) > 1
    assert found["sort"] == [None, "ascending", None, None, None, None, None, None]
    assert found["shown"] == "0 of 7 shown"
    assert found["harmful"] == "4 of 7 shown"


def test_the_command_prints_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "repo.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path} is not a run folder (it has no config.yaml)"
