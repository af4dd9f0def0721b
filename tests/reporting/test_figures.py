"""Figures of a report: drawn for any values and names, and readable."""

import numpy as np
import pytest

from repo.reporting.document import write_report
from repo.reporting.run_history import read
from tests.support.recorded import write_run

pytest.importorskip("matplotlib")

from tests.support.pages import Page, rewrite


def test_a_single_step_is_enough(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    text = Page(write_report(run).read_text()).text
    assert "No prompt has been answered twice yet" in text
    (run / "samples.jsonl").write_text("")  # killed between the two files
    assert "There are no responses to check" in Page(write_report(run).read_text()).text


@pytest.mark.parametrize(
    "algorithm", [{"method": "ppo"}, {"advantages": "gae", "cost_mode": "split"}, {"cost_limit": 0.1}]
)
def test_other_methods_and_unknown_numbers(tmp_path, algorithm):
    run = write_run(tmp_path / "run", steps=12, **algorithm)
    unknown = {"reward_safe_mean": None, "kl": None, "reward_cost_grad_ratio": None, "cost_explained_variance": 0.1}
    rewrite(run, "metrics", lambda r: unknown if r["step"] % 3 else unknown | {"reward_cost_grad_ratio": 2.0})
    text = Page(write_report(run).read_text()).text
    assert "gradient norms, reward ÷ λ cost (log)" in text
    assert "cost critic" in text
    assert "KL to reference" not in text  # never known
    assert f"Cost limit d {algorithm.get('cost_limit', 0):g}" in text
    rectified = algorithm.get("method", "repo") == "repo"
    assert f"{'rectified' if rectified else 'unsafe'} responses, C > d (%)" in text
    assert ("rectified responses" in text) == rectified


def test_a_dollar_in_a_name_is_no_mathematics_in_a_figure():
    import matplotlib

    from repo.reporting.style import STYLE, legend, log_axis, panel

    with matplotlib.rc_context(STYLE):
        figure, axes = panel()
        axes.plot([0, 1], [0.1, 100], label=r"a $\frac{ b$")
        log_axis(axes)
        legend(axes)
        figure.draw_without_rendering()
        assert [t.get_text() for t in axes.get_legend().get_texts()] == [r"a $\frac{ b$"]
        assert {"0.1", "1", "10", "100"} <= {t.get_text() for t in axes.get_yticklabels()}


def test_costs_that_are_all_equal_or_extreme_are_drawn(tmp_path):
    run = write_run(tmp_path / "run")
    for change_of in (lambda _: {"cost": 0.0}, lambda r: {"cost": 50.0 if r["step"] else -50.0}):
        rewrite(run, "samples", change_of)
        from repo.reporting.figures import draw_all

        assert {"distribution", "cumulative", "scatter"} <= {d.name for d in draw_all(read(run))}


def test_running_means_skip_what_is_not_known():
    from repo.reporting.style import running_mean

    found = running_mean(np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan]), 2)
    np.testing.assert_allclose(found, [1.0, 1.0, 3.0, 4.0, 5.0, np.nan])
    assert np.isnan(running_mean(np.arange(8.0), 6)[:2]).all()


@pytest.mark.parametrize(
    "names", [("E[C]", "E{C−d}⁺", "limit d = -12.345"), ("start, training", "now, training", "reference, held out")]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_legends_stay_inside_their_figure(names, count):
    import matplotlib

    from repo.reporting.style import STYLE, legend, panel

    with matplotlib.rc_context(STYLE):
        figure, axes = panel()
        for name in names[:count]:
            axes.plot([0, 1], [0, 1], label=name)
        legend(axes)
        figure.draw_without_rendering()
        found = axes.get_legend().get_window_extent()
    assert found.x1 <= figure.bbox.x1
    assert axes.get_window_extent().width > 0.8 * figure.bbox.width


def test_a_cost_at_the_limit_falls_into_a_safe_bin():
    from repo.reporting.style import edges_of

    edges = edges_of(np.array([-2.0, 0.1, 3.0]), 0.1)
    assert 0.1 in edges
    assert edges[0] < -2.0
    assert edges[-1] >= 3.0


def test_the_course_of_a_limit_that_moves_is_drawn_beside_lambda(tmp_path):
    from repo.reporting.figures import draw_all

    run = write_run(tmp_path / "run", steps=6, cost_limit=0.25)
    for moves in (False, True):
        if moves:
            rewrite(run, "metrics", lambda r: {"limit": 2.0 - 0.3 * r["step"]})
        drawn = next(figure for figure in draw_all(read(run)) if figure.name == "penalty")
        assert ("limit used in the step (dotted: the run's limit d = 0.25)" in drawn.svg) == moves
        assert ("λ moves by the limit used in the step" in drawn.caption) == moves


def test_the_decisions_of_a_gate_are_drawn_with_the_safe_rate(tmp_path):
    run = write_run(tmp_path / "run", steps=8)
    assert "gate" not in Page(write_report(run).read_text()).text

    def decided(record):
        if record["step"] % 2 == 0:
            return {}
        return {"gate_accepted": float(record["step"] != 3), "gate_safe_rate": 0.5}

    rewrite(run, "metrics", decided)
    text = Page(write_report(run).read_text()).text
    assert "gate, validation prompts: accepted" in text
    assert "gate: taken back" in text


def test_an_odd_number_of_small_panels_leaves_no_empty_frame(tmp_path):
    from repo.reporting.small_panels import TRAINING, draw_small

    run = write_run(tmp_path / "run", steps=8)
    rewrite(run, "metrics", lambda r: {"credit_explained_variance": 0.1 * r["step"]})
    drawn = draw_small(read(run), TRAINING, "Training")
    assert drawn is not None
    shown = [axes.get_title() for axes in drawn[0].axes if axes.axison]
    assert shown == ["gradient norm", "sampling, tokens/s", "credit of tokens, expl. var."]
    assert len(drawn[0].axes) == 4


def test_a_run_on_pairs_shows_how_the_pairs_are_learned(tmp_path):
    run = write_run(tmp_path / "run", steps=10, method="cdpo")
    unsampled = {"safe_rate": None, "kl": None}
    learned = {"pair_accuracy": 0.75, "pair_margin": 0.2, "pair_log_ratio": -0.1, "pair_confidence": 0.9}
    rewrite(run, "metrics", lambda r: learned | ({} if r["step"] % 5 == 4 else unsampled))
    text = Page(write_report(run).read_text()).text
    for title in ("Pairs", "moved towards the better, %", "margin β Δ", "confidence of the labels, %"):
        assert title in text
    assert "Method cdpo (pairs)" in text
    assert "λ moves in the steps that sample the policy." in text
    assert "λ moves once per batch." in Page(write_report(write_run(tmp_path / "other", steps=8)).read_text()).text
