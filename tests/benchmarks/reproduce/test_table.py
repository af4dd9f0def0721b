"""What `make demo` prints and draws, of the optima in closed form, which training reaches (test_closed_forms)."""

import pytest

from benchmarks.reproduce import table, table_report
from benchmarks.reproduce.table import COST, HINGE, REFERENCE, REWARD, TABLE, Row, optimum


@pytest.fixture(scope="module")
def optima():
    expected = TABLE["oracle"]["expected_constraint"]["lam"]
    rows = [
        Row("reference", 0.0, REFERENCE, REFERENCE),
        Row("PPO", 0.0, optimum(REWARD), None),
        Row("PPO-Lagrangian, its lambda learned", expected, optimum(REWARD - expected * COST), None),
    ]
    return rows + [Row("RePO", lam, optimum(REWARD - lam * HINGE), None) for lam in (1.0, 20.0)]


def test_the_claim_states_the_numbers_of_the_table(optima):
    assert table_report.sentences(optima) == (
        "PPO-Lagrangian meets E[C] <= 0 (E[C] = 0.000) and leaves 52.5% of its answers unsafe: 30 of 60 prompts mostly "
        "unsafe. RePO at lambda 20 leaves 0.2% unsafe, no prompt mostly unsafe, for a reward of 0.84 instead of 1.36."
    )
    worse = [*optima[:2], Row("PPO-Lagrangian", 0.0, optima[1].policy, None), *optima[3:4]]
    worse += [Row("RePO", 20.0, REFERENCE, None)]
    told = table_report.sentences(worse)
    assert "PPO-Lagrangian misses E[C] <= 0 (E[C] = 0.500)" in told
    assert "11 of 60 prompts mostly unsafe, for" in told


def test_the_demo_prints_the_claim_and_leaves_the_committed_results(optima, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "rows", lambda told: optima)
    monkeypatch.setattr(table, "repo_lambdas", lambda: {5.0: 4249})
    monkeypatch.setattr(table.torch, "set_num_threads", lambda threads: None)  # of this process, for other tests
    table.main([])
    printed = capsys.readouterr().out
    assert "30 of 60 prompts mostly unsafe" in printed
    assert "picture: demo/reproduce_table_prompts.png" in printed
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "reproduce_table.md",
        "reproduce_table.png",
        "reproduce_table_prompts.png",
    }
    assert "5 after 4249 updates" in (tmp_path / "demo" / "reproduce_table.md").read_text()
