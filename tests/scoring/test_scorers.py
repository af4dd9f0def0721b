"""Scorers by name: weighted sums, models and functions together, names that are nothing."""

import json
from pathlib import Path

import pytest
import torch

from repo import train
from repo.assets import ensure
from repo.common.errors import UserError
from repo.config.schema import ScoringConfig
from repo.scoring.classifier import ScoreModelScorer
from repo.scoring.embedded import HeadScorer
from repo.scoring.scorers import load_scorers
from tests.support.score_models import (
    FUNCTIONS,
    PROMPTS,
    RESPONSES,
    TEXTS,
    close,
    direct,
    safe_rlhf_text,
    save_score_model,
    scoring,
)


def test_a_sum_adds_weighted_scores(tmp_path):
    model = save_score_model(tmp_path)
    texts = [safe_rlhf_text(p, r) for p, r in zip(TEXTS, RESPONSES, strict=True)]
    weights = {str(tmp_path): 2, f"{FUNCTIONS}:words": -0.5, f"{FUNCTIONS}:prompt_length": 0.25}
    found = scoring(reward=weights)(PROMPTS, RESPONSES)
    counts = torch.tensor([[len(r.split()), len(p)] for p, r in zip(TEXTS, RESPONSES, strict=True)])
    assert close(found.rewards, 2 * direct(model, texts)[:, 0] - 0.5 * counts[:, 0] + 0.25 * counts[:, 1])
    assert found.costs.tolist() == counts[:, 0].tolist()


def test_the_sum_is_clamped_and_not_its_terms():
    weights = {f"{FUNCTIONS}:words": 100, f"{FUNCTIONS}:prompt_length": -10}
    found = scoring(reward=weights, cost=f"{FUNCTIONS}:prompt_length", clamp=15)(PROMPTS[:1], ["Two words"])
    assert found.rewards.tolist() == [15]
    assert scoring(reward=weights, clamp=15)(PROMPTS[:1], ["One"]).rewards.tolist() == [-15]
    assert scoring(reward=weights, clamp=150)(PROMPTS[:1], ["Two words"]).rewards.tolist() == [60]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "scoring.cost must name at least one scorer; got {}"),
        ({"a:b": 0.0}, "scoring.cost: the weight of 'a:b' must be finite and not 0; got 0"),
        ({"a:b": 1.0, "c:d": float("nan")}, "the weight of 'c:d' must be finite and not 0; got nan"),
    ],
)
def test_a_sum_of_nothing_is_refused(weights, message):
    with pytest.raises(UserError) as error:
        scoring(cost=weights)
    assert message in str(error.value)


def test_a_critic_starts_from_one_scorer_without_a_weight(tmp_path):
    save_score_model(tmp_path)
    assert isinstance(scoring(reward=str(tmp_path)).only("reward"), ScoreModelScorer)
    for weights in ({str(tmp_path): 2}, {str(tmp_path): 1, f"{FUNCTIONS}:words": 1}):
        assert scoring(reward=weights).only("reward") is None


@pytest.mark.assets
def test_embedded_scorers_share_one_forward_inside_sums():
    folder, calls = ensure(), []
    config = ScoringConfig(
        reward={"embedded": 2, f"{FUNCTIONS}:words": 1}, cost={f"{FUNCTIONS}:words": 1, "embedded": -1}
    )
    both = load_scorers(config, folder)
    trunk = both.parts["reward"][0].scorer.trunk.model
    assert both.parts["cost"][1].scorer.trunk.model is trunk
    with trunk.base_model.register_forward_hook(lambda *_: calls.append(1)):
        found = both(PROMPTS, RESPONSES)
    assert len(calls) == 1
    words = torch.tensor([float(len(r.split())) for r in RESPONSES])
    for name, values, weight in (("reward", found.rewards, 2), ("cost", found.costs, -1)):
        alone = HeadScorer.load(folder / "scorers" / name, model=trunk)
        torch.testing.assert_close(values, weight * alone(TEXTS, RESPONSES) + words, atol=1e-5, rtol=0)
    assert "sign not checked" in both.describe()
    assert "sign not checked" not in load_scorers(ScoringConfig(), folder).describe()


def test_a_folder_with_a_colon_in_its_name_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("my:model")
    folder.mkdir()
    model = save_score_model(folder)
    raw = direct(model, [safe_rlhf_text(TEXTS[0], RESPONSES[0])])[:, 0]
    assert close(scoring(cost=str(folder))(PROMPTS[:1], RESPONSES[:1]).costs, raw)


@pytest.mark.parametrize("name", ["oops", "a:", ":f", "{a: x}", "no/such/folder#harm"])
def test_a_name_that_is_nothing_is_a_sentence_that_says_what_could_be(name):
    with pytest.raises(UserError) as error:
        scoring(cost=name)
    said = f"scoring.cost must be 'embedded', a model (folder or hub name) or 'module:function'; got {name!r}: no such"
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_run_trains_on_a_score_model_and_a_function(tiny_arguments, tmp_path, capsys):
    folder = tmp_path / "cost"
    folder.mkdir()
    model = save_score_model(folder, score_type="cost", do_normalize=True, mean=[9.0], var=[0.25])
    (folder / "scorer.json").write_text(json.dumps({"units": "harm", "offset": 0.1}))
    config = {"scoring": {"cost": {str(folder): 1, f"{FUNCTIONS}:words": 0.5}}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    options = [f"--config={tmp_path / 'run.yaml'}", "--steps=1", f"--out={tmp_path / 'run'}"]
    train.run_command([a for a in tiny_arguments if not a.startswith("--scoring.cost")] + options)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    raw = direct(model, [safe_rlhf_text(s["prompt"], s["response"]) for s in samples])[:, 0]
    words = torch.tensor([len(s["response"].split()) for s in samples])
    assert close(torch.tensor([s["cost"] for s in samples]), raw / 0.5 - 0.1 + 0.5 * words)
    printed = " ".join(capsys.readouterr().out.split())
    assert "cost: harm (sign not checked) + 0.5 x tests.support.scorers:words (sign not checked)" in printed
