"""Check a wheel in the environment that it was installed in: nothing is missing in it, and it runs without the sources.

    python -I .ci/check_wheel.py WHEEL

Prints one line. Exits with 1 and the list of what is missing otherwise.
"""

import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("repo", "repo_kernels")


def missing_files(wheel: Path) -> list[str]:
    """Return the files of the packages in the sources that the wheel lacks."""
    names = set(zipfile.ZipFile(wheel).namelist())
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)) for path in paths if path.suffix not in (".pyc", ".so")}
    return sorted(sources - names)


def run(*arguments: str) -> str:
    """Run Python isolated from the sources and return what it prints."""
    return subprocess.run([sys.executable, "-I", *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    missing = missing_files(Path(sys.argv[1]))
    if missing:
        sys.exit(f"the wheel lacks {', '.join(missing)}")
    for package in PACKAGES:
        path = import_module(package).__file__
        if path is None or not Path(path).is_relative_to(sys.prefix):
            sys.exit(f"{package} was imported from {path}, not from {sys.prefix}")
    if not import_module("repo_kernels.backends.cpu").available():
        sys.exit("the wheel has no C++ backend")
    run(str(ROOT / "examples" / "loss_only.py"))
    if "--model.path" not in run("-m", "repo.train", "--help"):
        sys.exit("`python -m repo.train --help` does not list the fields")
    print(f"{Path(sys.argv[1]).name}: complete, and runs on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
