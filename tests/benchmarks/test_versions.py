"""Every supported Triton compiles the kernels and is right in its interpreter; the bounds are what was tried.

The tests marked `versions` install a Triton in a folder of its own. CI runs those that are not `aot`
(`make test-triton-quick`), `make test-triton` all.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.compiled import versions
from benchmarks.compiled.kernels import ITEM_SIZE, TARGETS, compile_all
from tests.support.kernels.machine_code import KINDS, QUICK_TARGETS, check, check_decode

ROOT = Path(__file__).parents[2]
DECODE_STEP = "tests/kernels/layers/test_decode_step.py"
KERNELS = ROOT / "repo_kernels" / "backends" / "triton"

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux")
# The environment's own version is what every other test runs with.
others = pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=pytest.mark.skipif(version == versions.current(), reason="the environment's own"))
        for version in versions.VERSIONS
    ],
)


@needs_linux
@pytest.mark.versions
@others
def test_kernels_compile_for_one_target_of_each_maker(version: str) -> None:
    kernels = compile_all(QUICK_TARGETS, ["bf16"], version)
    assert {kernel.triton for kernel in kernels} == {version}
    assert {kernel.kind for kernel in kernels} == KINDS
    check(kernels)


@needs_linux
@pytest.mark.versions
@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
@others
def test_kernels_compile_for_every_target_and_type(version: str, target: str) -> None:
    kernels = compile_all([target], triton=version)
    assert {kernel.triton for kernel in kernels} == {version}
    assert {kernel.dtype for kernel in kernels} == set(ITEM_SIZE)
    check(kernels)
    check_decode(compile_all([target], triton=version, part="decode"))


def run_tests(version: str, *arguments: str) -> None:
    """Assert that these tests pass in a process of their own, in the interpreter of this version of Triton."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    found = versions.run(version, ["-c", "import triton; print(triton.__version__)"])
    assert found.stdout.strip() == version, found.stderr
    done = versions.run(version, command, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert re.search(r"\d+ passed", done.stdout) or "[100%]" in done.stdout


@needs_linux
@pytest.mark.versions
@others
def test_rows_are_right_in_the_interpreter(version: str) -> None:
    run_tests(version, "tests/kernels/backends/triton", DECODE_STEP, "-m", "not long and not gpu")


@needs_linux
@pytest.mark.versions
@pytest.mark.aot
@others
def test_hard_numerical_cases_are_right_in_the_interpreter(version: str) -> None:
    run_tests(version, "tests/kernels/numerics", "-k", "triton", "-m", "not long")


def requirement(package: str) -> Requirement:
    """The requirement of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == package)


def lower_bound(package: str) -> str:
    """The version after >=."""
    return next(part.version for part in requirement(package).specifier if part.operator == ">=")


def test_lower_bounds_are_the_oldest_versions_that_are_tested() -> None:
    oldest = versions.RELEASES[0]
    assert Version(lower_bound("triton")) == Version(oldest.version)
    assert lower_bound("torch") == oldest.torch[0]


def test_every_tested_version_is_within_the_bounds_and_in_order() -> None:
    assert [version for version in versions.VERSIONS if version not in requirement("triton").specifier] == []
    assert sorted(versions.VERSIONS, key=Version) == list(versions.VERSIONS)
    torch = [version for release in versions.RELEASES for version in release.torch]
    assert [version for version in torch if version not in requirement("torch").specifier] == []
    assert sorted(torch, key=Version) == torch


def test_no_release_of_torch_between_the_tested_ones_is_left_out() -> None:
    minors = [int(version.split(".")[1]) for release in versions.RELEASES for version in release.torch]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_the_torch_that_the_makefile_installs_pins_a_tested_version() -> None:
    default = re.search(r"^TORCH \?= torch==(\d+\.\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert default is not None
    assert default[1] in {version for release in versions.RELEASES for version in release.torch}


def nested_targets(path: Path) -> Iterator[str]:
    """The tuples within a tuple to which an assignment or a loop of this file unpacks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.For) else []
        for target in targets:
            if isinstance(target, ast.Tuple) and any(isinstance(x, ast.Tuple | ast.List) for x in target.elts):
                yield f"{path.name}:{node.lineno}"


def test_no_kernel_unpacks_a_tuple_within_a_tuple() -> None:
    """Up to Triton 3.7 the first call fails, and later ones run under a cache key that ignores the source."""
    assert not list(itertools.chain.from_iterable(map(nested_targets, sorted(KERNELS.rglob("*.py")))))


def test_another_version_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "triton" / "3.4.0"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").write_text("__version__ = 'the other one'")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(versions, "current", lambda: "3.9.0")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert versions.variables("3.4.0")["PYTHONPATH"] == f"{folder}:elsewhere"
    assert versions.run("3.4.0", ["-c", "import triton; print(triton.__version__)"]).stdout == "the other one\n"
    assert versions.variables("3.9.0")["PYTHONPATH"] == "elsewhere"


def test_a_version_is_chosen_before_the_first_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", sys)
    with pytest.raises(RuntimeError, match="before the first is imported"):
        versions.use("3.4.0")
