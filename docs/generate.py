"""Write the generated pages: docs/configuration.md from the configuration, docs/api/ from the docstrings.

python docs/generate.py        as `make docs` does; tests/docs checks that the committed pages are current
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DOCS = Path(__file__).parent
EXPORTS = "repo_kernels"
"""The package whose public names are documented, each on the page of the module that defines it."""
MODULES = ("repo_kernels.advantages", "repo_kernels.pairs", "repo_kernels.penalty", "repo_kernels.safety")
"""Modules whose public functions and classes are documented."""
NOTE = "<!-- Written by `make docs`; edit the docstrings instead. -->"
LONGEST = 300
"""Lines of a page; a longer one is divided."""
CONFIGURATION = """# Configuration

{note}

Fields are set by a preset (`--preset paper`), a YAML file (`--config run.yaml`) and dotted options
(`--optimizer.lr 1e-5`), each of which overrides the one before. `--print_config` prints the resolved
configuration, `--help` this list. An unknown key is an error that names the nearest one. Lists and mappings are
written as in YAML: `--algorithm.clip_range '[0.2, 0.28]'`.

```yaml
steps: 200
model:
  path: path/to/model
optimizer:
  lr: 1.0e-05
```
"""
NAMED = re.compile(r"([\w{}]+(?:, [\w{}]+)*): +")
TYPES = {
    "PositiveInt": "integer > 0",
    "NonNegativeInt": "integer ≥ 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number ≥ 0",
    "ClosedUnitInterval": "number in [0, 1]",
    "str": "text",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "Any": "any value",
}


def escape(text: str) -> str:
    """Escape what Markdown would take for emphasis or HTML, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    pattern = re.compile(r"(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|\*(?=\S)|(?<=\S)\*|<(?=[A-Za-z/])")
    return "".join(part if part.startswith("`") else pattern.sub(r"\\\g<0>", part) for part in parts)


def field_docs(kind: type) -> dict[str, str]:
    """Read the docstring below each field of a class, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def describe_type(kind: Any) -> str:
    """Say in words what a field takes."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is NoneType:
        return "null"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"[{'; '.join(describe_type(argument) for argument in arguments)}]"
    if origin is dict:
        return f"mapping of {describe_type(arguments[0])} to {describe_type(arguments[1])}"
    return TYPES[kind.__name__]


def configuration_page() -> str:
    """Build docs/configuration.md: a table of the fields of each group."""
    from repo.config.schema import Config

    parts = [CONFIGURATION.format(note=NOTE), *_group("", Config)]
    for field in fields(Config):
        if isinstance(field.default_factory, type) and is_dataclass(field.default_factory):
            parts += _group(field.name, field.default_factory)
    return "\n".join(parts)


def _group(name: str, kind: type) -> Iterator[str]:
    """Yield the heading, the docstring and the table of one group's own fields."""
    types, docs = get_type_hints(kind), field_docs(kind)
    yield f"## {name or 'Top level'}\n\n{escape(' '.join(inspect.getdoc(kind).split()))}\n"
    yield "| field | takes | default | meaning |\n|---|---|---|---|"
    for field in fields(kind):
        default = field.default if field.default is not MISSING else field.default_factory()
        if is_dataclass(default):
            continue
        dotted = f"{name}.{field.name}" if name else field.name
        meaning = escape(docs[field.name])
        cells = (f"`{dotted}`", describe_type(types[field.name]), f"`{json.dumps(default)}`", meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def paragraphs(docstring: str) -> Iterator[list[str]]:
    """Yield the blocks of lines between empty lines."""
    for block in re.split(r"\n\s*\n", docstring):
        yield block.splitlines()


def markdown(docstring: str) -> str:
    """Turn a docstring into Markdown: prose, lists of named arguments, and indented formulas as code."""
    return "\n\n".join(_block(lines) for lines in paragraphs(docstring))


def _block(lines: list[str]) -> str:
    """Write one paragraph, section or formula."""
    section = re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes):", lines[0])
    if section:
        return f"**{section[1]}**\n\n{_section(textwrap.dedent(chr(10).join(lines[1:])).splitlines())}"
    if all(line.startswith(" ") for line in lines):
        return f"```text\n{textwrap.dedent(chr(10).join(lines))}\n```"
    if any(line.startswith(" ") for line in lines[1:]):  # a formula or a hanging list within the paragraph
        first = next(i for i, line in enumerate(lines) if line.startswith(" "))
        if not NAMED.match(lines[0]) and all(line.startswith(" ") for line in lines[first:]):
            return f"{_prose(lines[:first])}\n\n{_block(lines[first:])}"
    return _named(lines) if NAMED.match(lines[0]) else _prose(lines)


def _prose(lines: list[str]) -> str:
    """Write a paragraph."""
    return re.sub(r"::$", ":", escape("\n".join(line.strip() for line in lines)))


def _section(lines: list[str]) -> str:
    """Write what stands below Args, Returns or Raises: a list where it names something, else prose."""
    items: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1].append(line)
        else:
            items.append([line])
    if not any(NAMED.match(item[0]) for item in items):
        return _prose(lines)
    return "\n".join(_named(item) if NAMED.match(item[0]) else f"\n{_prose(item)}" for item in items)


def _named(lines: list[str]) -> str:
    """Write `name: text`, several of which may stand in a line, as a list."""
    text = " ".join(line.strip() for line in lines)
    items = []
    for item in re.split(r"(?<=\.) (?=[a-z_{}][\w{}]*(?:, [a-z_{}][\w{}]*)*: )", text):
        named = NAMED.match(item)
        items.append(f"- `{named[1]}`: {escape(item[named.end() :])}" if named else f"- {escape(item)}")
    return "\n".join(items)


def signature(name: str, function: Any) -> str:
    """Write a call of a function or class, one argument on a line where it is long."""
    described = inspect.signature(function)
    shown = []
    star = False
    for p in described.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not star:
            star = True
            shown.append("*")
        star = star or p.kind is p.VAR_POSITIONAL
        text = str(p.replace(annotation=p.empty, default=p.empty))
        annotation = "" if p.annotation is p.empty else f": {_annotation(p.annotation)}"
        default = "" if p.default is p.empty else f"{' = ' if annotation else '='}{_default(p.default)}"
        shown.append(text + annotation + default)
    returned = described.return_annotation
    end = "" if inspect.isclass(function) or returned is described.empty else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(shown)}){end}"
    return line if len(line) <= 100 else _broken(f"{name}(", shown, f"){end}")


def _broken(begin: str, lines: Iterable[str], end: str) -> str:
    """Write a call with each argument on its own line."""
    return "\n".join([begin, *(f"    {line}," for line in lines), end])


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _default(value: Any) -> str:
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":  # how dataclasses mark a default_factory
        return "..."
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def entry(name: str, thing: Any) -> Iterator[str]:
    """Yield the section of a function or class: signature, docstring, and the members of a class."""
    yield f"## {name}"
    yield _code(signature(name, thing))
    yield markdown(_docstring(thing))
    if not inspect.isclass(thing):
        return
    if docs := field_docs(thing):
        yield "\n".join(f"- `{field}`: {escape(text)}" for field, text in docs.items())
    for member, value in vars(thing).items():
        documented = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        inherited = member != "forward" and any(hasattr(base, member) for base in thing.__bases__)
        if member.startswith("_") or inherited or not inspect.isfunction(documented) or not documented.__doc__:
            continue
        yield f"### {name}.{member}"
        if not isinstance(value, property):
            yield _code(signature(member, documented))
        yield markdown(inspect.cleandoc(documented.__doc__))


def _docstring(thing: Any) -> str:
    """Read a docstring; that of a dataclass with the arguments that its bases describe before its own."""
    text = inspect.getdoc(thing) or ""
    if not is_dataclass(thing):
        return text
    docs = [inspect.cleandoc(base.__dict__.get("__doc__") or "") for base in reversed(thing.__mro__[1:])]
    inherited = [doc.partition("\nArgs:\n")[2].partition("\n\n")[0] for doc in docs]
    return text.replace("\nArgs:\n", "\n".join(["\nArgs:", *filter(None, inherited), ""]), 1)


def documented() -> dict[str, dict[str, Any]]:
    """Find what is documented: by module, its public functions and classes in the order of their definition."""
    package = importlib.import_module(EXPORTS)
    pages: dict[str, dict[str, Any]] = {}
    for name in package.__all__:
        thing = getattr(package, name)
        if callable(thing):
            pages.setdefault(thing.__module__, {})[name] = thing
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        pages[module_name] = {
            name: thing
            for name, thing in vars(module).items()
            if (inspect.isfunction(thing) or inspect.isclass(thing))
            and thing.__module__ == module_name
            and not name.startswith("_")
        }
    return {
        module: dict(sorted(things.items(), key=lambda pair: inspect.getsourcelines(pair[1])[1]))
        for module, things in sorted(pages.items(), key=lambda page: (page[0] in MODULES, page[0]))
    }


def api_pages() -> dict[str, str]:
    """Build the pages of docs/api by file name: one for each module, or for each name where that would be long."""
    pages, index = {}, ["# API", NOTE, "Public functions and classes, from their docstrings."]
    for module, things in documented().items():
        place = module if module in MODULES or not module.startswith(f"{EXPORTS}.") else EXPORTS
        about = (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n", 1)[0]
        whole = _api_page(module, about, place, things)
        if len(whole.splitlines()) <= LONGEST:
            files = dict.fromkeys(things, f"{module}.md")
            pages[f"{module}.md"] = whole
        else:
            files = {name: f"{place}.{name}.md" for name in things}
            pages |= {files[name]: _api_page(f"{place}.{name}", "", place, {name: things[name]}) for name in things}
        rows = [f"| [`{name}`]({files[name]}#{name.lower()}) | {_summary(thing)} |" for name, thing in things.items()]
        index += [f"## {module}", _prose(about.splitlines()), "\n".join(["| | |\n|---|---|", *rows])]
    return {"README.md": "\n\n".join(index) + "\n", **pages}


def _api_page(title: str, about: str, place: str, things: dict[str, Any]) -> str:
    """Write one page: its title, what is said about it, how to import its names, and their sections."""
    imported = f"from {place} import {', '.join(things)}"
    parts = [f"# {title}", NOTE, _prose(about.splitlines())]
    parts.append(_code(imported if len(imported) <= 100 else _broken(f"from {place} import (", things, ")")))
    for name, thing in things.items():
        parts += entry(name, thing)
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(thing: Any) -> str:
    """The first sentence of a docstring, for a cell of a table."""
    first = " ".join(next(paragraphs(inspect.getdoc(thing) or ""), []))
    sentence = re.split(r"(?<=\.)\s|::?$|:\s{2,}", first, maxsplit=1)[0]
    return escape(sentence).replace("|", "\\|")


def pages() -> dict[Path, str]:
    """Build every generated page, by its path."""
    api = {DOCS / "api" / name: text for name, text in api_pages().items()}
    return {DOCS / "configuration.md": configuration_page(), **api}


def main() -> None:
    """Write the pages, and remove pages of docs/api that are no longer generated."""
    written = pages()
    for path in set((DOCS / "api").glob("*.md")) - set(written):
        path.unlink()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(written)} pages written in {DOCS}")


if __name__ == "__main__":
    main()
