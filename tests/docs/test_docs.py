"""What the pages say can be done can be done: code runs; options, commands, links and files exist."""

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from repo_kernels import LossOptions

from .pages import GENERATED, PAGES, ROOT, anchors, blocks, read, run_blocks, without_code

WRITTEN = [name for name in PAGES if not name.startswith(GENERATED)]
WITH_CODE = [name for name in WRITTEN if blocks(read(name), "python")]
OWN_FOLDERS = ("benchmarks/", "csrc/", "docs/", "examples/", "repo/", "repo_kernels/", "tests/")


@pytest.fixture(scope="module")
def generator():
    """The program that writes the generated pages."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_of_a_page_runs(name):
    torch.manual_seed(0)
    run_blocks(read(name))


def test_the_advantages_example_is_the_split_form(capsys):
    run_blocks(read("docs/method.md"))
    # safe response: only its reward; unsafe: 0.5 - 2 * 1.2; both discounted by lambda = 0.95 per token before the last
    expected = torch.tensor([[0.95**2, 0.95, 1.0], [-1.9 * 0.95, -1.9, 0.0]])
    assert capsys.readouterr().out.strip() == str(expected)


def test_the_scorers_of_the_example_are_scorers():
    from repo.scoring.manifest import make_manifest

    names = run_blocks(read("docs/training.md"))
    assert names["helpfulness"](["a"], ["b c"]) == [0.04]
    assert names["harm"](["a", "a"], ["my password", "no"]) == [1.0, -1.0]
    check = make_manifest(names["harm"].manifest, "harm").sign_check
    low, high = names["harm"]([check["prompt"]] * 2, [check["lower"], check["higher"]])
    assert low < high


def test_every_preset_is_described():
    from repo.config.parse import preset_names

    table = read("docs/training.md").split("| preset (", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(preset_names())


def test_the_pure_functions_that_are_named_exist():
    from repo_kernels import advantages, penalty

    sentence = read("docs/method.md").split("\n`group_advantages`", 1)[1].split("are pure functions", 1)[0]
    names = set(re.findall(r"`(\w+)`", sentence))
    assert len(names) == 11
    assert all(hasattr(advantages, name) or hasattr(penalty, name) for name in names)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_field_that_is_named_exists(name):
    from repo.config.fields import field_names

    text = read(name) if name != "CHANGELOG.md" else ""  # which names the old fields
    known = set(field_names())
    groups = {field.split(".")[0] for field in known if "." in field}
    options = set(re.findall(r"--([a-z_]+\.[a-z_]+)", text))
    fields = {f"{group}.{field}" for group, field in re.findall(r"`([a-z]+)\.([a-z_]+)", text) if group in groups}
    assert options | fields <= known


@pytest.mark.parametrize("name", WRITTEN)
def test_every_switch_that_is_named_exists(name):
    from repo.config.fields import field_names

    sources = [*(ROOT / "repo").glob("*.py"), ROOT / "repo/assets/__main__.py", *(ROOT / "benchmarks").rglob("*.py")]
    sources += [*(ROOT / "repo/config").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    sources.append(ROOT / "repo/evaluation/shield_options.py")
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    known = set(re.findall(r'"--([\w-]+)"', code)) | set(field_names()) | {"help", "print_config"}
    foreign = {"nproc_per_node", "no-deps", "no-build-isolation"}  # torchrun's and pip's
    switches = {switch for switch in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", read(name)) if "." not in switch}
    assert switches <= known | foreign


@pytest.mark.parametrize("name", WRITTEN)
def test_every_command_that_is_named_exists(name):
    text = read(name)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"-m ((?:repo|benchmarks)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for program in re.findall(r"python ((?:docs|examples|benchmarks)/\S+\.py)", text):
        assert (ROOT / program).is_file(), program


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_lead_somewhere(name):
    text = without_code(read(name))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", WRITTEN)
def test_files_that_are_named_exist(name):
    named = re.findall(r"`([\w.\-]+/[\w./\-]*)`", without_code(read(name)))
    for path in (p for p in named if p.startswith(OWN_FOLDERS)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_no_placeholder_and_no_long_page(name):
    text = read(name)
    assert "@@" not in text
    assert len(text.splitlines()) <= 350


def test_the_folder_is_small_enough_to_read():
    assert len([path for path in (ROOT / "docs").iterdir() if path.is_file()]) <= 15


def test_the_generated_pages_are_current(generator):
    written = generator.pages()
    stale = [str(path.relative_to(ROOT)) for path, text in written.items() if _read(path) != text]
    stale += [str(path.relative_to(ROOT)) for path in set((ROOT / "docs" / "api").glob("*.md")) - set(written)]
    assert not stale, "run `make docs`"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_the_configuration_page_has_every_field(generator):
    from repo.config.fields import field_names

    page = generator.configuration_page()
    assert all(f"| `{name}` |" in page for name in field_names())


def test_the_api_pages_have_every_public_name(generator):
    import repo_kernels

    text = "\n".join(generator.api_pages().values())
    assert all(re.search(rf"^## {name}$", text, re.MULTILINE) for name in repo_kernels.__all__ if name[0] != "_")


def test_the_imports_of_the_api_pages_work_and_their_dataclasses_describe_every_field(generator):
    pages = generator.api_pages()
    for text in pages.values():
        for block in blocks(text, "python"):
            if block.startswith("from "):
                exec(compile(block, "page", "exec"), {})
    options = pages["repo_kernels.losses.options.md"].partition("**Args**")[2]
    assert all(f"- `{field.name}`: " in options for field in fields(LossOptions))


def test_a_docstring_becomes_markdown(generator):
    docstring = (
        "Do it::\n\n    a = b*c\n\nArgs:\n    x, y: (B,) of *args. z: other,\n        more.\n\nReturns:\n    One."
    )
    assert generator.markdown(docstring) == (
        "Do it:\n\n```text\na = b*c\n```\n\n**Args**\n\n- `x, y`: (B,) of \\*args.\n- `z`: other, more.\n\n"
        "**Returns**\n\nOne."
    )
    assert "generate" not in sys.modules  # the program is no module of the packages
