"""Every causal-LM family of the installed transformers: it trains exactly, or is refused by a sentence."""

from pathlib import Path

import pytest

from benchmarks.families.sweep import sweep
from benchmarks.families.table import BEGIN, GOOD, table
from benchmarks.families.tiny_config import FAMILIES
from benchmarks.families.trial import run

ROOT = Path(__file__).parent.parent.parent
SLICE = {  # family -> the way it reads and decodes
    "llama4_text": ("padded", "cache"),
    "gemma4_text": ("packed", "cache"),
    "deepseek_v3": ("packed", "cache"),
    "doge": ("padded", "cache"),
    "qwen3_next": ("padded", "cache"),
    "falcon_h1": ("padded", "cache"),
    "mamba2": ("padded", "cache"),
    "zamba2": ("padded", "cache"),
    "mamba": ("padded", "cache, one prompt at a time"),
    "rwkv": ("one at a time", "no cache, one prompt at a time"),
    "bart": ("one at a time", "cache, one prompt at a time"),
    "minimax": ("padded", "no cache, one prompt at a time"),
}


@pytest.mark.parametrize("family", SLICE)
def test_a_family_trains_in_the_fastest_way_that_is_exact(family, tmp_path):
    outcome = run(family, tmp_path / "model")
    assert outcome["result"] == "trains", outcome["why"]
    assert (outcome["layout"], outcome["decoding"]) == SLICE[family]
    assert outcome["difference"] < 1e-4


@pytest.mark.parametrize("family", ["bert", "xlnet"])
def test_a_family_that_no_way_serves_is_refused_by_a_sentence(family, tmp_path):
    outcome = run(family, tmp_path / "model")
    assert outcome["result"] == "refused"
    assert outcome["why"].startswith("model.path: ")


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_differs_silently(family):
    (outcome,) = sweep([family])
    assert outcome["result"] in GOOD, outcome["why"]


def test_the_table_of_families_lists_each_of_them():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split(BEGIN)[1]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][1:]
    results = {name.strip(): result.strip() for name, result in rows}
    assert {*results.values()} <= {*GOOD}
    assert sum(result == "trains" for result in results.values()) >= 45
    assert len(results) >= 150


def test_a_cell_of_the_table_is_one_short_line():
    why = "model.path: | cannot load '/tmp/x/model': " + "word " * 80
    row = table([{"family": "a", "result": "refused", "why": why, "layout": "", "decoding": "", "difference": 0.0}])
    assert row.splitlines()[-1].count("|") == 7
    assert len(row.splitlines()[-1]) < 260
