"""The history of each prompt in a report, and the pairs of responses to it."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from repo.reporting.document import grouped, write_report
from repo.reporting.prompt_history import ledger
from repo.reporting.run_history import read
from tests.support.recorded import write_run

pytest.importorskip("matplotlib")

from tests.support.pages import HOSTILE, Page, page_of, rewrite


def test_lengths_are_those_of_the_steps_or_counted_from_the_samples(tmp_path):
    from repo.reporting.small_panels import metric_of

    run = write_run(tmp_path / "run")
    rewrite(run, "metrics", lambda r: {"length": 7.5 if r["step"] else None})
    np.testing.assert_allclose(metric_of(read(run), "length"), [9.0, *[7.5] * 5])


def test_samples_without_a_score_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run")
    rewrite(run, "samples", lambda r: {"cost": None} if r["step"] == 2 else {})
    text = page_of(run).text
    assert "4 samples without a reward or a cost were left out." in text
    assert "4 training prompts in 10 visits" in text


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
