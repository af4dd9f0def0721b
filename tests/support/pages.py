"""Reports as pages that tests can read, and runs with edited records."""

import json
from html.parser import HTMLParser

from repo.reporting.document import assemble
from repo.reporting.run_history import read
from tests.support.recorded import write_lines

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
    """The report of a run but for its figures, parsed."""
    found = Page(assemble(read(run), []))
    assert not found.open
    return found


def rewrite(run, name, change_of):
    """Edit the records of metrics.jsonl or samples.jsonl."""
    path = run / f"{name}.jsonl"
    write_lines(path, [r | change_of(r) for r in map(json.loads, path.read_text().splitlines())])
