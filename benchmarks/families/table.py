"""The table of docs/models.md: what becomes of each family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

BEGIN, END = "<!-- families -->", "<!-- end of families -->"
GOOD = ("trains", "refused", "not built")
PLURAL = {"trains": "train", "fails": "fail", "differs": "differ"}


def faults(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """List the families that end in an error or whose results differ from those of the model alone."""
    return [o["family"] for o in outcomes if o["result"] not in GOOD]


def write_table(outcomes: Sequence[dict[str, Any]], page: Path) -> None:
    """Replace the table in a page of the documentation."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}", encoding="utf-8")


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Format the outcomes in Markdown: a line of counts, and a row for each family."""
    counts = Counter(o["result"] for o in outcomes)
    counted = ", ".join(f"{number} {PLURAL.get(result, result)}" for result, number in counts.most_common())
    lines = [
        f"{len(outcomes)} families of transformers {transformers.__version__}, torch {torch.__version__}: {counted}.",
        "",
        "| family | | reads | decodes | largest difference, nats | why |",
        "|---|---|---|---|---|---|",
    ]
    for o in sorted(outcomes, key=lambda o: o["family"]):
        difference = f"{o['difference']:.0e}" if o["layout"] else ""
        why = _short(o["why"])
        lines.append(f"| {o['family']} | {o['result']} | {o['layout']} | {o['decoding']} | {difference} | {why} |")
    return "\n".join(lines)


def _short(why: str) -> str:
    """Shorten a sentence for a cell, and leave out what would break the table."""
    why = why.removeprefix("model.path: ").replace("|", "/").replace("<", "").replace(">", "").replace("`", "")
    words = " ".join("…" if word.startswith(("'/tmp", "/tmp")) else word for word in why.split())
    return words if len(words) <= 200 else words[:199].rsplit(" ", 1)[0] + " …"
