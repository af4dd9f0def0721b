"""Evaluations as numbers: intervals, pairs of policies, the panel and the sentence."""

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from repo.common.errors import UserError
from repo.compare import run_command
from repo.config.schema import AlgorithmConfig
from repo.data.sequences import make_sequences
from repo.evaluation.comparison import contender, read_evaluation, safety_table, sign_test, win_rates
from repo.evaluation.statistics import QUANTITIES, Evaluation, aligned, measured, paired
from repo.evaluation.tables import print_summary, show_change
from repo.reporting.pareto import draw_frontier, frontier
from repo.runs.panel import SafetyPanel
from repo.runs.records import reward_cost_grad_ratio
from repo.scoring.safety import compensation_sentence, summarize
from repo.training.advantages import Advantages
from repo.training.batch import Batch


def evaluation_of(costs, rewards=None, limit=0.0, ids=None, **more):
    """costs: a list for each prompt, of its responses."""
    rewards = rewards or [[0.0] * len(c) for c in costs]
    records = []
    for p, (of_prompt, earned) in enumerate(zip(costs, rewards, strict=True)):
        for c, r in zip(of_prompt, earned, strict=True):
            name = ids[p] if ids else f"p{p}"
            records.append({"id": name, "category": f"c{p % 2}", "prompt": "?", "response": "!", "tokens": 4})
            records[-1] |= {"reward": r, "cost": c}
    for key, column in more.items():
        for record, value in zip(records, column, strict=True):
            record[key] = value
    return Evaluation(records, limit)


NUMBERS = st.floats(-5, 5, width=32)
TABLES = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=k, max_size=k), min_size=1, max_size=6)
)


@given(TABLES, st.floats(-1, 1, width=32))
def test_quantities_are_those_of_the_training_metrics(table, limit):
    costs, rewards = ([[pair[i] for pair in prompt] for prompt in table] for i in (0, 1))
    found = evaluation_of(costs, rewards, limit)
    expected = summarize(
        torch.tensor(rewards).flatten(), torch.tensor(costs).flatten(), found_group(found), cost_limit=limit
    )
    names = {"reward_mean": "reward", "cost_mean": "cost", "reward_safe_mean": "reward_safe"}
    for key, value in expected.items():
        ours = float(QUANTITIES[names.get(key, key)](found.columns))
        assert ours == pytest.approx(value, abs=1e-5, nan_ok=True)


def found_group(evaluation):
    """(B,) the prompt of each response."""
    return torch.tensor([evaluation.ids.index(r["id"]) for r in evaluation.records])


def test_every_interval_holds_its_estimate_but_for_the_maximum():
    generator = np.random.default_rng(0)
    found = measured(evaluation_of(generator.normal(0, 1, (40, 3)).tolist()).columns)
    assert found["cost_max"]["low"] is None
    for key in ("cost", "safe_rate", "rectified_cost", "compensation_gap", "cost_p95", "prompts_mostly_unsafe"):
        assert found[key]["low"] <= found[key]["mean"] <= found[key]["high"]


def test_a_quantity_without_a_value_is_null():
    found = measured(evaluation_of([[1.0], [2.0]]).columns)
    assert found["reward_safe"] == {"mean": None, "low": None, "high": None}


def test_columns_that_an_evaluation_lacks_are_left_out():
    plain = evaluation_of([[1.0]])
    judged = evaluation_of([[1.0]], judge_safe=[True], kl=[0.5], surprise=[2.0], refusal=[False], repetition=[0.0])
    assert "judge_safe_rate" not in measured(plain.columns)
    assert measured(judged.columns)["kl_per_token"]["mean"] == 0.125
    assert measured(judged.columns)["entropy"]["mean"] == 0.5
    assert "kl" not in paired(plain, judged)
    assert set(judged.summary()["categories"]) == {"c0"}


def test_prompts_with_different_numbers_of_responses_are_refused():
    with pytest.raises(UserError, match="equally many responses"):
        measured(evaluation_of([[1.0], [1.0, 2.0]]).columns)


def test_pairs_are_matched_by_prompt_and_not_by_place():
    a = evaluation_of([[0.0], [1.0], [9.0]], ids=["x", "y", "only a"])
    b = evaluation_of([[2.0], [0.5]], ids=["y", "x"])
    left, right = aligned(a, b)
    assert left["cost"].tolist() == [[0.0], [1.0]]
    assert right["cost"].tolist() == [[0.5], [2.0]]
    assert paired(a, b)["cost"]["mean"] == 0.75
    with pytest.raises(UserError, match="no prompt in common"):
        aligned(a, evaluation_of([[1.0]], ids=["z"]))


def test_a_paired_interval_is_narrower_than_that_of_two_means():
    base = np.random.default_rng(0).normal(0, 1, (60, 1))
    a, b = evaluation_of(base.tolist()), evaluation_of((base - 0.1).tolist())
    change, alone = paired(a, b)["cost"], measured(a.columns)["cost"]
    assert change["low"] == pytest.approx(change["high"])
    assert alone["high"] - alone["low"] > 0.3


def test_the_two_by_two_table_counts_prompts_by_the_majority_of_their_responses():
    a = evaluation_of([[1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1]])
    b = evaluation_of([[-1, -1, 1], [-1, -1, -1], [1, 1, -1], [1, 1, 1]])
    assert safety_table(a, b).tolist() == [[1, 1], [1, 1]]


def test_the_sign_test_is_exact():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 2 / 2**5
    assert sign_test(8, 2) == pytest.approx(0.109375)


def test_wins_count_every_pair_of_responses_and_half_of_ties():
    a = evaluation_of([[1.0, -1.0]], [[0.0, 1.0]])
    b = evaluation_of([[-1.0, -1.0]], [[1.0, 2.0]])
    found = win_rates(a, b)
    assert found["reward"]["mean"] == (1 + 0.5 + 1 + 1) / 4
    assert found["cost"]["mean"] == (1 + 1 + 0.5 + 0.5) / 4
    assert found["constrained"]["mean"] == (1 + 1 + 0.5 + 1) / 4  # against the unsafe one safety decides
    assert win_rates(a, a)["constrained"]["mean"] == 0.5
    dear, poor = evaluation_of([[1.0]], [[5.0]]), evaluation_of([[-1.0]], [[0.0]])  # unsafe with more reward
    assert win_rates(dear, poor)["reward"]["mean"] == 0.0
    assert win_rates(dear, poor)["constrained"]["mean"] == 1.0


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_no_point_of_the_frontier_is_dominated_and_every_other_one_is(points):
    best = {points[i] for i in frontier(points)}
    for p in points:
        dominated = any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)
        assert (p in best) != dominated


def write(folder, name, evaluation):
    """RUN/eval/<name>.json."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    content = {"cost_limit": evaluation.cost_limit, "summary": {}, "responses": evaluation.records}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(content))


def test_runs_are_compared_by_their_newest_evaluations(tmp_path, capsys):
    for name, shift in (("a", 0.5), ("b", -0.5)):
        for stem, costs in (("before", 0.2), ("step-000002", 0.1), ("after", shift)):
            write(tmp_path / name, stem, evaluation_of([[costs], [-costs]], judge_safe=[True, False]))
    found = contender(str(tmp_path / "a"))
    assert [stem for stem, _ in found.trail] == ["before", "step-000002", "after"]
    run_command([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    printed = capsys.readouterr().out
    counts = "0 safe in both, 1 became safe, 1 became unsafe, 0 unsafe in both"
    assert f"prompts with one response each by training cost: {counts}" in printed
    assert "prompts with one response each by held-out judge: 1 safe in both" in printed
    content = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert content["pairs"][0]["changes"]["cost"]["mean"] == 0.0
    assert (tmp_path / "c" / "frontier.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(UserError, match="exists; choose another folder"):
        run_command([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")])


def test_bad_input_of_a_comparison_is_told(tmp_path):
    with pytest.raises(UserError, match="two or more runs"):
        run_command([str(tmp_path)])
    with pytest.raises(UserError, match="neither an evaluation file nor a run"):
        contender(str(tmp_path / "nothing"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="is not an evaluation that this version can read"):
        read_evaluation(tmp_path / "bad.json")
    write(tmp_path / "a", "after", evaluation_of([[1.0]]))
    write(tmp_path / "b", "after", evaluation_of([[1.0]], limit=0.5))
    out = ["--out", str(tmp_path / "c")]
    with pytest.raises(UserError, match="different cost limits"):
        run_command([str(tmp_path / "a"), str(tmp_path / "b"), *out])
    run_command([str(tmp_path / "a"), str(tmp_path / "b"), *out, "--cost-limit", "2"])


def test_evaluations_made_in_other_ways_are_not_taken_for_the_same(tmp_path, capsys):
    for name, made in (
        ("a", {"cost_scorer": "x"}),
        ("b", {"cost_scorer": "y"}),
        ("c", {"cost_scorer": "x", "judge": "z"}),
    ):
        write(tmp_path / name, "after", evaluation_of([[1.0], [0.0]] if name == "c" else [[1.0, 1.0], [0.0, 1.0]]))
        path = tmp_path / name / "eval" / "after.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | made))
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="different cost scorers"):
        run_command([str(tmp_path / "a"), str(tmp_path / "b"), *out])
    with pytest.raises(UserError, match="is given twice"):
        run_command([str(tmp_path / "a"), str(tmp_path / "a"), *out])
    run_command([str(tmp_path / "a"), str(tmp_path / "c"), *out])
    printed = capsys.readouterr().out
    assert "the evaluations differ in judge" in printed
    assert "responses per prompt differ" in printed
    assert "became unsafe" not in printed
    changes = json.loads((tmp_path / "out" / "comparison.json").read_text())["pairs"][0]["changes"]
    assert "safe_rate" in changes
    assert "prompts_mostly_unsafe" not in changes


def test_prompts_with_one_id_and_other_texts_are_no_pair():
    a, b = (evaluation_of([[0.0]]) for _ in range(2))
    b.records[0]["prompt"] = "another question"
    with pytest.raises(UserError, match="no prompt in common"):
        aligned(a, b)


def test_few_prompts_have_no_interval():
    a, b = evaluation_of([[0.0]] * 9), evaluation_of([[1.0]] * 9)
    for found in (measured(a.columns)["cost"], paired(a, b)["cost"], win_rates(a, b)["cost"]):
        assert found["low"] is None
    assert measured(evaluation_of([[0.0]] * 10).columns)["cost"]["low"] == 0.0


def test_shares_change_by_points_and_names_are_not_markup():
    change = {"mean": 0.075, "low": None, "high": None}
    assert show_change(change, "{:.1%}") == "+7.5 points"
    assert show_change({"mean": 0.1, "low": -0.1, "high": 0.2}, "{:.3f}") == "+0.100 [-0.100, +0.200]"
    found = evaluation_of([[0.0], [1.0]])
    for record, name in zip(found.records, ("[bold]", "[/x]"), strict=True):
        record["category"] = name
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(console, "[/a]", found.summary())
    text = console.export_text()
    assert all(name in text for name in ("[bold]", "[/x]", "[/a]"))


def test_a_figure_takes_any_name(tmp_path):
    trail = [("after", measured(evaluation_of([[0.0], [1.0]]).columns))]
    draw_frontier({"_hidden": trail, "a$\\nope$": trail}).savefig(tmp_path / "f.png")


def test_the_sentence_is_said_when_the_mean_hides_unsafe_prompts():
    assert compensation_sentence(-0.1, 0.0, 0.25) == "mean constraint met (E[C] = -0.100 <= 0), 25.0% of prompts unsafe"
    assert compensation_sentence(-0.1, 0.0, 0.0) is None
    assert compensation_sentence(0.1, 0.0, 0.25) is None


def samples_of(*costs):
    """Records of one step, two responses to each prompt."""
    return [{"id": f"p{i // 2}", "reward": 0.0, "cost": c} for i, c in enumerate(costs)]


def test_the_panel_says_so_once_each_time_it_begins():
    console = Console(record=True, width=200, file=io.StringIO())
    panel = SafetyPanel(console, 0.0)
    for _ in range(6):
        panel.add(samples_of(-3.0, -3.0, 1.0, 1.0))
    for _ in range(12):
        panel.add(samples_of(-3.0, -3.0, -1.0, -1.0))
    assert panel.sentence is None
    for _ in range(2):
        panel.add(samples_of(-3.0, -3.0, 1.0, 1.0))
    said = [line for line in console.export_text(clear=False).splitlines() if line]
    assert [line.split(" in the last")[0] for line in said] == [
        "mean constraint met (E[C] = -1.000 <= 0), 50.0% of prompts unsafe",
        "mean constraint met (E[C] = -1.875 <= 0), 6.2% of prompts unsafe",
    ]
    console.print(panel)
    shown = console.export_text()
    for figure in ("mean cost -1.750", "E{C-d}+ 0.125", "12% of responses, 12% of prompts", "compensation gap 0.125"):
        assert figure in shown


@pytest.mark.parametrize("mode", ["rectified", "split"])
@pytest.mark.parametrize("agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_ratio_of_gradient_norms_is_that_of_autograd(mode, agg):
    from repo_kernels import repo_loss

    lengths, costs = (3, 1, 2), torch.tensor([0.4, -0.2, 1.0])
    sequences = make_sequences([[1]] * 3, [list(range(2, 2 + n)) for n in lengths], 0)
    mask = sequences.response_mask
    reward, cost = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.7, 0.1, -0.9])
    algorithm = AlgorithmConfig(cost_mode=mode, loss_agg_mode=agg)
    batch = Batch(sequences, Advantages(reward, cost, reward), costs, torch.zeros(mask.shape), lam=2.0, beta=0.0)
    norms = []
    for rewards, lam in ((reward, 0.0), (torch.zeros(3), 2.0)):
        logits = torch.zeros(*mask.shape, 8, requires_grad=True)

        def everywhere(x):
            return x[:, None].expand(mask.shape)

        repo_loss(
            logits,
            sequences.response_ids,
            None,
            everywhere(rewards),
            everywhere(cost),
            costs=everywhere(costs),
            cost_mode="split" if mode == "split" else "lagrangian",
            lam=lam,
            response_mask=mask,
            loss_agg_mode=agg,
        ).loss.backward()
        # d loss/d logits_v = g (1[v = y] - p_v), so that its entry at y is g (1 - 1/8)
        g = logits.grad.gather(-1, sequences.response_ids[..., None]).squeeze(-1) / (1 - 1 / 8)
        norms.append(g[mask].norm().item())
    assert reward_cost_grad_ratio(algorithm, batch) == pytest.approx(norms[0] / norms[1], rel=1e-5)


def test_without_a_cost_term_there_is_no_ratio():
    sequences = make_sequences([[1]], [[2]], 0)
    one = torch.ones(1)
    batch = Batch(sequences, Advantages(one, one, one), one, torch.zeros(1, 1), lam=0.0, beta=0.0)
    assert math.isnan(reward_cost_grad_ratio(AlgorithmConfig(), batch))
    assert math.isnan(reward_cost_grad_ratio(AlgorithmConfig(method="ppo"), batch))
