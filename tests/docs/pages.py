"""The pages that users read, and what is taken out of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
GENERATED = ("docs/api/", "docs/configuration.md")


def read(name: str) -> str:
    """Read a page by its path from the root of the repository."""
    return PAGES[name].read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Find the code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    """Drop code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def run_blocks(text: str) -> dict:
    """Execute the Python blocks of a page in order, in one namespace, and return it."""
    names: dict = {"__name__": "page"}
    for block in blocks(text, "python"):
        exec(compile(block, "page", "exec"), names)
    return names


def anchors(text: str) -> set[str]:
    """List the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
