"""Scorer functions as they come: with alarms, connections and event loops of their own, and with torch settings."""

import asyncio
import contextlib
import signal
import sqlite3
import sys
import threading
import time
import types

import pytest
import torch

from repo.common.errors import UserError
from repo.data.prompts import Prompt
from repo.scoring.function import FunctionScorer
from repo.scoring.scorers import check_sign

PROMPTS = [Prompt("a", "a", "", columns={"answer": 4, "id": "a"}), Prompt("b", "b", "", columns={"id": "b"})]
RESPONSES = ["one", "two"]


@pytest.fixture
def scorer(monkeypatch):
    """Make a scorer of a function."""

    def make(function, timeout=20.0):
        module = types.ModuleType("user_module")
        module.score = function
        monkeypatch.setitem(sys.modules, "user_module", module)
        return FunctionScorer("user_module:score", "cost", timeout)

    return make


class OwnTimeoutError(Exception):
    """What a scorer's own time limit raises."""


def ring(*_):
    raise OwnTimeoutError


def under_own_limit(work, seconds=5):
    """Do as math_verify does: a handler of its own, an alarm, and both undone at the end."""
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        return work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_a_function_may_do_what_only_the_main_thread_may(scorer):
    connection = sqlite3.connect(":memory:")

    def score(prompts, responses):
        assert threading.current_thread() is threading.main_thread()
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        one = connection.execute("select 1").fetchone()[0]
        return under_own_limit(lambda: [one, 2 * one])

    assert scorer(score)(PROMPTS, RESPONSES).tolist() == [1, 2]


def test_the_functions_own_alarm_rings_in_it(scorer):
    def score(prompts, responses):
        previous = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(10)
        except OwnTimeoutError:
            return [1, 1]
        finally:
            signal.signal(signal.SIGALRM, previous)

    assert scorer(score)(PROMPTS, RESPONSES).tolist() == [1, 1]


def hang_after_an_alarm_of_its_own(prompts, responses):
    under_own_limit(lambda: None)
    time.sleep(10)


def hang_and_catch_exceptions(prompts, responses):
    for _ in range(100):
        with contextlib.suppress(Exception):
            time.sleep(0.1)


def hang_and_catch_everything(prompts, responses):
    end = time.monotonic() + 1
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            time.sleep(0.1)
    return [0, 0]


def hang_and_rename(prompts, responses):
    try:
        time.sleep(10)
    except BaseException:
        raise ValueError("no answer") from None


@pytest.mark.parametrize("place", ["main thread", "another thread"])
@pytest.mark.parametrize(
    "function",
    [hang_after_an_alarm_of_its_own, hang_and_catch_exceptions, hang_and_catch_everything, hang_and_rename],
)
def test_the_time_limit_holds_whatever_the_function_does(function, place, scorer):
    if place == "another thread" and function is hang_after_an_alarm_of_its_own:
        pytest.skip("alarms belong to the main thread")
    made, errors, start = scorer(function, 0.2), [], time.monotonic()

    def call():
        with pytest.raises(UserError, match=r"did not return within scoring.timeout=0.2 seconds") as error:
            made(PROMPTS, RESPONSES)
        errors.append(error)

    if place == "main thread":
        call()
    else:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(5)
    assert errors
    assert time.monotonic() - start < 4


def test_an_alarm_that_the_function_leaves_behind_does_not_ring(scorer):
    def score(prompts, responses):
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        return [0, 0]

    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGVTALRM)
    scorer(score)(PROMPTS, RESPONSES)
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    time.sleep(0.2)


@pytest.mark.parametrize("function", [lambda p, r: [0, 0], lambda p, r: under_own_limit(lambda: [0, 0])])
def test_a_timer_that_ran_before_the_call_runs_on(function, scorer):
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        scorer(function)(PROMPTS, RESPONSES)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.3
        time.sleep(0.4)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_torch_settings_are_restored_after_a_call(scorer):
    def score(prompts, responses):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        return [0, 0]

    assert scorer(score)(PROMPTS, RESPONSES).tolist() == [0, 0]
    assert torch.is_grad_enabled()
    assert torch.empty(1).dtype == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_torch_settings_are_restored_after_an_import(tmp_path, monkeypatch):
    (tmp_path / "module_with_settings.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\ndef score(prompts, responses):\n"
        "    settings = torch.is_grad_enabled(), torch.empty(1).dtype, torch.empty(1).device.type\n"
        "    return [float(settings == (False, torch.float64, 'meta'))] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = FunctionScorer("module_with_settings:score", "reward", 20.0)
    assert torch.is_grad_enabled()
    assert torch.empty(1).dtype == torch.float32
    assert torch.empty(1).device.type == "cpu"
    assert made(PROMPTS, RESPONSES).tolist() == [1, 1]
    assert torch.is_grad_enabled()
    assert torch.empty(1).device.type == "cpu"


def test_a_sparse_result_is_read_and_a_number_too_large_is_a_sentence(scorer):
    assert scorer(lambda p, r: torch.tensor([0.0, 2.0]).to_sparse())(PROMPTS, RESPONSES).tolist() == [0, 2]
    with pytest.raises(UserError, match="must return 2 numbers; got list"):
        scorer(lambda p, r: [0, 10**400])(PROMPTS, RESPONSES)


def test_a_function_gets_the_columns_that_it_names(scorer):
    def score(prompts, responses, answer, id="none", missing=7):
        assert (answer, id, missing) == ([4, None], ["a", "b"], 7)
        return [0, 0]

    def keyword(questions, texts, *, answer):
        return [answer[0], 0]

    def everything(prompts, responses, **columns):
        assert columns == {"answer": [4, None], "id": ["a", "b"]}
        return [0, 0]

    def bare(prompts, responses):
        return [0, 0]

    for function in (score, keyword, everything, bare):
        scorer(function)(PROMPTS, RESPONSES)


def test_a_column_named_as_the_first_parameters_is_not_passed_twice(scorer):
    prompts = [Prompt("a", "a", "", columns={"prompts": "x", "other": 1})]
    made = scorer(lambda prompts, responses, **columns: [list(columns) == ["other"]])
    assert made(prompts, ["r"]).tolist() == [1]


def test_a_parameter_that_is_no_column_is_an_error_that_lists_the_columns(scorer):
    made = scorer(lambda prompts, responses, solution: [0, 0])
    with pytest.raises(UserError, match="the parameter 'solution', which is no column of the data; it has answer, id"):
        made(PROMPTS, RESPONSES)


def test_the_canned_prompt_of_a_manifest_may_have_columns(scorer):
    def score(prompts, responses, answer):
        return [float(r == a) for r, a in zip(responses, answer, strict=True)]

    score.manifest = {"sign_check": {"prompt": "2 + 2?", "lower": "5", "higher": "4", "answer": "4"}}
    check_sign(scorer(score), "scoring.cost")
    score.manifest = {"sign_check": {"prompt": "2 + 2?", "lower": "5", "higher": "4", "solution": "4"}}
    with pytest.raises(UserError, match="'answer', which is no column of the data; it has solution"):
        check_sign(scorer(score), "scoring.cost")
