"""The page of a report: self-contained, escaped and well formed."""

import hashlib
import json
import re
from base64 import b64encode

import pytest

from repo.reporting.page import escaped, number
from tests.support.recorded import write_evaluation, write_run

pytest.importorskip("matplotlib")

from tests.support.pages import HOSTILE, Page, page_of, rewrite

FIGURES = "held_out reward cost distribution cumulative safe_rate compensation penalty scatter policy training".split()


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


def test_few_responses_are_not_checked(tmp_path):
    text = page_of(write_run(tmp_path / "run", held_out=9)).text
    assert text.count("Too few responses to check: the checks need 10 on each side.") == 2
    assert "Nothing found" not in text


def test_numbers():
    assert [number(x) for x in (-1.234, -0.001, None, float("nan"))] == ["−1.23", "0.00", "–", "–"]
