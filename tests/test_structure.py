"""The tree stays readable: small files and folders, and imports between the folders that go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("repo", "repo_kernels", "benchmarks", "tests", "csrc", "docs", "examples")
WRITTEN = {".py", ".pyi", ".cpp", ".h", ".txt", ".md", ".yaml", ".html", ".js"}  # by hand, unlike results and weights
GENERATED = ROOT / "benchmarks" / "results"
# Each folder imports from those before it.
LAYERS = {
    "repo": (
        "common config data attention scoring models rollout memory training runs evaluation gate reporting".split()
    ),
    "repo_kernels": "backends layers losses integrations".split(),
}
MOST_LINES, MOST_FILES = 350, 14


def files_of(folder: str) -> Iterator[Path]:
    """Yield the written files below a folder of the root."""
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in WRITTEN and GENERATED not in path.parents:
            yield path


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names of the modules that a file imports, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_folders(package: str, folder: str) -> set[str]:
    """Return the folders of a package that the files of one of its folders import from."""
    names = set().union(*(imported_modules(path) for path in (ROOT / package / folder).rglob("*.py")))
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == package and len(part) > 1} & set(LAYERS[package]) - {folder}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_long(folder):
    long = {}
    for path in files_of(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            long[str(path.relative_to(ROOT))] = lines
    assert not long


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_is_full(folder):
    counts: dict[str, int] = {}
    for path in files_of(folder):
        parent = str(path.parent.relative_to(ROOT))
        counts[parent] = counts.get(parent, 0) + 1
    # docs/models.md and docs/api are written by commands, as docs/configuration.md is
    # repo/advantages.py and repo/penalty.py are old names, which go with the next release
    most = dict.fromkeys(("docs", "docs/api", "repo"), MOST_FILES + 1)
    assert not {name: count for name, count in counts.items() if count > most.get(name, MOST_FILES)}


def test_the_training_loop_fits_on_a_few_screens_and_imports_few_modules():
    path = ROOT / "repo" / "loop.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 200
    assert len({name for name in imported_modules(path) if name.startswith("repo.")}) <= 15


@pytest.mark.parametrize(("package", "folder"), [(p, folder) for p, folders in LAYERS.items() for folder in folders])
def test_a_folder_imports_only_from_those_before_it(package, folder):
    before = LAYERS[package][: LAYERS[package].index(folder)]
    assert imported_folders(package, folder) <= set(before)


def test_every_folder_has_its_place_in_the_order():
    for package, layers in LAYERS.items():
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders - {"assets"} == set(layers)


def test_commands_are_imported_by_no_folder():
    commands = {f"repo.{path.stem}" for path in (ROOT / "repo").glob("*.py")} - {"repo.__init__"}
    for folder in [*LAYERS["repo"], "assets"]:
        for path in (ROOT / "repo" / folder).rglob("*.py"):
            assert not imported_modules(path) & commands, path


def test_the_embedded_assets_are_reached_through_setup_alone():
    users = {
        path.relative_to(ROOT / "repo").as_posix()
        for path in (ROOT / "repo").rglob("*.py")
        if path.parent.name != "assets" and any(name.startswith("repo.assets") for name in imported_modules(path))
    }
    assert users == {"setup.py"}
