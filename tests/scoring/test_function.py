"""Python functions as scorers: a time limit, interrupts, and results that are no scores."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from repo.common.errors import UserError
from tests.support.score_models import FUNCTIONS, PROMPTS, RESPONSES, scoring


def test_a_function_that_hangs_stops_the_run_in_time():
    both, started = scoring(cost=f"{FUNCTIONS}:hanging", timeout=0.2), time.monotonic()
    with pytest.raises(UserError) as error:
        both(PROMPTS, RESPONSES)
    assert time.monotonic() - started < 5
    assert str(error.value) == (
        "scoring.cost 'tests.support.scorers:hanging' did not return within scoring.timeout=0.2 seconds"
    )


def test_a_function_that_hangs_does_not_keep_the_process_alive(tiny_arguments, tmp_path):
    options = [f"--scoring.cost={FUNCTIONS}:hanging", "--scoring.timeout=0.2", f"--out={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "repo.train", *tiny_arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)  # it sleeps for 60 seconds
    assert done.returncode == 2
    assert "did not return within scoring.timeout" in done.stderr


def test_an_interrupt_reaches_a_run_that_waits_for_a_function(interruptible):
    both, main, started = scoring(cost=f"{FUNCTIONS}:hanging"), threading.main_thread().ident, time.monotonic()
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        both(PROMPTS, RESPONSES)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "scoring.cost 'tests.support.scorers:raising' raised KeyError: 'harm' ("),
        ("leaving", "raised SystemExit: no key ("),
        ("too_few", "must return 4 numbers; got shape (3,)"),
        ("not_a_number", "'tests.support.scorers:not_a_number' gave nan for a response to the prompt 'What is bread?'"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_did(name, message):
    with pytest.raises(UserError) as error:
        scoring(cost={f"{FUNCTIONS}:words": 1, f"{FUNCTIONS}:{name}": 1e-9})(PROMPTS, RESPONSES)
    assert message in str(error.value)


def test_a_time_limit_beyond_the_clocks_range_is_no_limit():
    assert scoring(timeout=float("inf"))(PROMPTS, RESPONSES).costs.tolist() == [4, 0, 4, 4]
