"""What a user of the method wants to see: held-out prompts before and after, and axes, steps and caps as they are."""

import io
import json
import re

import matplotlib
import pytest
from rich.console import Console

from repo.reporting import figures
from repo.reporting.document import assemble
from repo.reporting.pareto import draw_frontier
from repo.reporting.run_history import read
from repo.reporting.style import STYLE
from repo.runs.console import COLUMNS, ConsoleTable
from tests.support.recorded import write_run


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    return read(write_run(tmp_path_factory.mktemp("runs") / "run", steps=18, held_out=40))


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(STYLE):
        yield


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_each_held_out_prompt_is_a_point_and_the_corners_count_them(history):
    figure, _, caption = figures._held_out(history)
    axes = figure.axes[0]
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == 40
    counts = dict(text.rsplit(": ", 1) for text in texts(figure))
    assert counts.keys() == {"stayed safe", "safe → unsafe", "unsafe → safe", "stayed unsafe"}
    before, after = (history.evaluations[k].evaluation.columns["cost"].mean(1) for k in ("before", "after"))
    assert int(counts["unsafe → safe"]) == int(((before > 0) & (after <= 0)).sum())
    assert sum(map(int, counts.values())) == 40
    assert "40 held-out prompts" in caption
    labels = axes.get_legend_handles_labels()[1]
    assert labels[0].startswith("harmful (")


def test_without_both_evaluations_there_is_no_such_figure(tmp_path):
    assert figures._held_out(read(write_run(tmp_path / "run"))) is None


@pytest.mark.parametrize("name", ["_policy", "_training", "_safe_rate", "_penalty", "_compensation"])
def test_no_axis_of_a_quantity_that_cannot_be_negative_goes_below_zero(history, name):
    for axes in figures.__dict__[name](history)[0].axes:
        if axes.has_data() and axes.get_yscale() == "linear":
            assert axes.get_ylim()[0] >= 0


def test_caps_are_drawn(history):
    penalty = figures._penalty(history)[0].axes[0]
    assert 10.0 in [line.get_ydata()[0] for line in penalty.lines]
    assert "its cap 10" in penalty.get_title(loc="left")
    lengths = [axes for axes in figures._policy(history)[0].axes if "length" in axes.get_title(loc="left")]
    assert "of 40" in lengths[0].get_title(loc="left")


def test_the_console_counts_steps_from_one_as_the_figures_do(history):
    text = io.StringIO()
    record = dict.fromkeys(COLUMNS, 0.5) | {"step": 0}
    ConsoleTable(Console(file=text, width=140)).row(record)
    assert text.getvalue().splitlines()[-1].startswith("   1  ")
    assert history.steps[0] == 1


def test_a_history_of_single_visits_has_no_column_that_compares_visits(tmp_path):
    runs = (
        write_run(tmp_path / "once", steps=2, prompts=8, per_step=2),
        write_run(tmp_path / "often", steps=8, prompts=2, per_step=2),
    )
    once, often = (assemble(read(run), []) for run in runs)
    heads = [re.findall(r'<th scope="col" data-kind.*?</th>', page) for page in (once, often)]
    assert [len(head) for head in heads] == [4, 8]
    assert "cost history" not in "".join(heads[0])


def test_on_a_phone_every_cell_of_the_comparison_has_its_name(tmp_path):
    page = assemble(read(write_run(tmp_path / "run", held_out=12)), [])
    assert '<td data-name="change">' in page
    assert ".stacked td::before { content: attr(data-name);" in page


@pytest.mark.parametrize("rates", [[(0.8, 0.6)], [(0.45, 1.0), (0.8, 0.6)]])
def test_the_frontier_has_a_line_also_for_a_single_point(rates):
    def quantities(safe, reward):
        return {"safe_rate": dict.fromkeys(("mean", "low", "high"), safe), "reward": {"mean": reward, "low": None}}

    figure = draw_frontier({f"run {i}": [("final", quantities(*rate))] for i, rate in enumerate(rates)})
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "frontier"]
    assert len(line.get_xdata()) == len(rates) + 2
    assert len(set(line.get_xdata())) > 1
    assert json.dumps(list(map(float, line.get_ydata())))
