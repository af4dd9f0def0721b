"""A command's help and its mistakes appear at once: torch and transformers load only when there is work for them."""

import subprocess
import sys

import pytest

HEAVY = "torch", "transformers", "triton", "datasets", "matplotlib"
PROGRAM = f"""
import sys
from repo.common.errors import exit_with_sentence
from repo.{{}} import main
sys.argv = {{!r}}
try:
    main()
except SystemExit:
    pass
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("loaded:", loaded)
"""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["--help"]),
        ("train", ["--optimzer.lr=1"]),
        ("train", ["--steps=0"]),
        ("train", ["--resume=nowhere"]),
        ("evaluate", ["--help"]),
        ("evaluate", ["model", "--seed=x"]),
        ("export", ["--help"]),
        ("export", ["nowhere"]),
        ("report", ["nowhere"]),
        ("compare", ["one"]),
    ],
)
def test_help_and_mistakes_load_nothing_heavy(command, arguments):
    program = PROGRAM.format(command, [f"repo.{command}", *arguments])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_the_help_of_an_evaluation_lists_its_own_switches_only():
    done = subprocess.run([sys.executable, "-m", "repo.evaluate", "--help"], capture_output=True, text=True, check=True)
    own = ("--checkpoint", "--reference", "--out", "--trust-remote-code", "--shield", "--shield-scorer")
    assert all(f"  {flag}" in done.stdout for flag in own)
    assert "--optimizer" not in done.stdout
    assert "--penalty" not in done.stdout
    assert len(done.stdout.splitlines()) < 36
