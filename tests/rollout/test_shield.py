"""The shield beside a written-out loop over the same draws, and what it refuses."""

import math
import statistics

import pytest
import torch

from repo.common.errors import UserError
from repo.config.schema import Config, RolloutConfig, ScoringConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.actor import Actor
from repo.models.policy import load_policy
from repo.rollout.engine import TransformersEngine, open_engine
from repo.rollout.sample import sample
from repo.rollout.shield import Shield, ensemble_costs
from repo.scoring.function import FunctionScorer
from repo.scoring.scorers import load_scorers
from tests.support.scorers import cost
from tests.support.tiny import QUESTIONS

ROLLOUT = RolloutConfig(max_response_tokens=6)
SAMPLES = 4


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(str(tiny_model), torch.device("cpu"), trainable=False)


@pytest.fixture(scope="module")
def prompts(policy):
    return tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200).kept


@pytest.fixture(scope="module")
def drawn(policy, prompts):
    """SAMPLES responses to each prompt, drawn at once: (texts, tokens, truncated), a list for each prompt."""
    rollout = sample(policy, prompts, SAMPLES, ROLLOUT, 3, "shield")
    columns = rollout.texts, rollout.sequences.response_lengths.tolist(), rollout.truncated.tolist()
    return [[column[i : i + SAMPLES] for i in range(0, len(column), SAMPLES)] for column in columns]


def letters(prompts, responses):
    """Cost: the number of letters; spread widely by the tiny model."""
    return [float(sum(c.isalpha() for c in r)) for r in responses]


def chosen_by_hand(texts, limit, samples):
    """Write out the rule for one prompt: (number of the draw, accepted, draws)."""
    costs = letters(None, texts)
    for number in range(samples):
        if costs[number] <= limit:
            return number, True, number + 1
    return min(range(samples), key=costs.__getitem__), False, samples


@pytest.mark.parametrize("samples", [1, 3, SAMPLES])
@pytest.mark.parametrize("refusal", [None, "I am sorry, I cannot help with that request."])
def test_a_shield_is_the_written_out_loop_over_the_same_draws(policy, prompts, drawn, samples, refusal):
    costs = sorted(c for texts in drawn[0] for c in letters(None, texts))
    limit = costs[len(costs) // 4]  # a quarter of the draws are acceptable
    shield = Shield(policy, letters, limit, samples, refusal=refusal, rollout=ROLLOUT, seed=3)
    found = shield(prompts)
    expected = [chosen_by_hand(texts, limit, samples) for texts in drawn[0]]
    assert found.accepted.tolist() == [accepted for _, accepted, _ in expected]
    assert found.draws.tolist() == [draws for *_, draws in expected]
    assert not found.deviation.any()
    for row, (number, accepted, _) in enumerate(expected):
        refused = refusal is not None and not accepted
        assert found.refused[row] == refused
        assert found.texts[row] == (refusal if refused else drawn[0][row][number])
        assert found.upper[row] == found.mean[row] == letters(None, drawn[0][row])[number]
        if not refused:
            assert found.tokens[row] == drawn[1][row][number]
            assert found.truncated[row] == drawn[2][row][number]
    if samples == SAMPLES:  # the limit makes each case happen
        assert {accepted for _, accepted, _ in expected} == {True, False}
        assert len({draws for *_, draws in expected}) > 1


def test_of_equal_upper_costs_the_first_draw_is_returned(policy, prompts, drawn):
    found = Shield(policy, lambda p, r: [2.0] * len(r), 1.0, SAMPLES, rollout=ROLLOUT, seed=3)(prompts)
    assert list(found.texts) == [texts[0] for texts in drawn[0]]
    assert found.draws.tolist() == [SAMPLES] * len(prompts)


def test_a_cost_at_the_limit_is_acceptable_also_where_fp32_rounds_it(policy, prompts):
    for limit in (0.1, -0.3):
        found = Shield(policy, lambda p, r, value=limit: [value] * len(r), limit, rollout=ROLLOUT)(prompts[:2])
        assert found.accepted.all()
        assert found.draws.tolist() == [1, 1]


def test_the_deviation_of_an_ensemble_moves_the_choice(policy, prompts, drawn):
    spread = {text: 1.0 + n for texts in drawn[0] for n, text in reversed([*enumerate(texts)])}
    ensemble = [lambda p, r, sign=sign: [sign * spread[text] for text in r] for sign in (-1.0, 0.0, 1.0)]  # mean 0
    for z in (0.0, 1.0):
        found = Shield(policy, ensemble, 0.5, SAMPLES, z, rollout=ROLLOUT, seed=3)(prompts)
        assert found.accepted.tolist() == [z == 0.0] * len(prompts)
        for row, text in enumerate(found.texts):
            by_hand = statistics.stdev([-spread[text], 0.0, spread[text]])
            assert float(found.deviation[row]) == pytest.approx(by_hand)
            assert float(found.upper[row]) == pytest.approx(z * by_hand)


def test_the_ensembles_mean_and_deviation_are_those_of_statistics(scorer_folder, prompts):
    values = [[1.0, 2.0, 4.5], [0.0, -3.0, 0.25], [5.0, 1.0, 1.0], [2.5, 0.5, -8.0]]
    scorers = [lambda p, r, row=row: row for row in values]
    mean, deviation = ensemble_costs(scorers, prompts[:3], ["a", "b", "c"])
    for column, (m, d) in enumerate(zip(mean.tolist(), deviation.tolist(), strict=True)):
        of_column = [row[column] for row in values]
        assert m == pytest.approx(statistics.fmean(of_column))
        assert d == pytest.approx(statistics.stdev(of_column))
    assert mean.dtype == deviation.dtype == torch.float64


def test_loaded_scorers_and_a_configurations_cost_are_members_like_functions(scorer_folder, prompts):
    asked, texts = prompts[:2], ["a banana", "an egg"]
    both = ScoringConfig("tests.support.scorers:reward", {"tests.support.scorers:cost": 0.5, str(scorer_folder): 2.0})
    scorers = load_scorers(both, None)
    classifier = scorers.parts["cost"][1].scorer
    members = [cost, FunctionScorer("tests.support.scorers:cost", "cost", 5.0), classifier, scorers]
    plain = torch.tensor(cost([], texts), dtype=torch.float64)
    raw = classifier(asked, texts).double()
    mean, _ = ensemble_costs(members, asked, texts)
    assert torch.allclose(mean, (2 * plain + raw + 0.5 * plain + 2 * raw) / 4, atol=1e-6)


def test_questions_are_asked_as_the_chat_template_has_them(policy, prompts):
    shield = Shield(policy, letters, 5.0, 2, rollout=ROLLOUT)
    found = shield([QUESTIONS[0]])
    assert found.prompts[0].token_ids == prompts[0].token_ids
    assert shield([QUESTIONS[0]]).texts == found.texts
    assert shield([QUESTIONS[0]], step=1).texts != found.texts


def test_a_prompt_asked_twice_gets_other_draws(policy):
    found = Shield(policy, lambda p, r: [0.0] * len(r), 0.0, rollout=ROLLOUT)([QUESTIONS[0]] * 3)
    assert len(set(found.texts)) > 1


def test_progress_adds_up_to_the_prompts(policy, prompts):
    steps = []
    Shield(policy, letters, 5.0, 3, rollout=ROLLOUT)(prompts, advance=steps.append)
    assert sum(steps) == len(prompts)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"scorer": []}, "scorer must be a cost scorer or a list of at least one; got an empty list"),
        ({"scorer": None}, "scorer must be a cost scorer or a list of at least one; got NoneType"),
        ({"scorer": [letters, "module:harm"]}, "got str"),
        ({"samples": 0}, "samples must be an integer >= 1; got 0"),
        ({"samples": 2.0}, "samples must be an integer >= 1; got 2.0"),
        ({"samples": True}, "samples must be an integer >= 1; got True"),
        ({"z": -0.1}, "z must be a finite number >= 0; got -0.1"),
        ({"z": math.nan}, "z must be a finite number >= 0; got nan"),
        ({"limit": math.inf}, "limit must be a finite number; got inf"),
        ({"refusal": " "}, "refusal must be a text that is not empty"),
        ({"policy": "path/to/model"}, "policy must be a Policy, .*; got str"),
    ],
)
def test_wrong_arguments_are_named(policy, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        Shield(**({"policy": policy, "scorer": letters, "limit": 0.0} | arguments))


def test_wrong_calls_are_named(policy):
    shield = Shield(policy, letters, 0.0, rollout=ROLLOUT)
    for prompts, sentence in (
        ([], "at least one prompt"),
        ("What is bread?", "takes a list"),
        (["bread " * 300], "leaves no room for rollout.max_response_tokens=6 in a context of 256"),
    ):
        with pytest.raises(UserError, match=sentence):
            shield(prompts)
    for values, sentence in (
        ([1.0, 2.0], r"must return 1 numbers; got shape \(2,\)"),
        ("many", "must return 1 numbers; "),
        ([math.nan], r"scorer 2 of 2 gave nan for a response to the prompt 'What is bread\?'"),
    ):
        with pytest.raises(UserError, match=sentence):
            Shield(policy, [letters, lambda p, r, values=values: values], 0.0, rollout=ROLLOUT)(["What is bread?"])


def test_training_refuses_a_shield_by_a_sentence(policy, prompts):
    shield = Shield(policy, letters, 0.0, rollout=ROLLOUT)
    sentence = "a Shield cannot be the policy or the engine of training: .* the ratio of the loss would be wrong"
    for attempt in (
        lambda: Actor(shield),
        lambda: sample(shield, prompts, 2, ROLLOUT, 0, 0),
        lambda: shield.update(0),  # as an engine
        lambda: shield.sample(prompts, 0),
        lambda: TransformersEngine(Config(), policy, shield).update(0),
    ):
        with pytest.raises(UserError, match=sentence):
            attempt()
    with open_engine(Config(), shield, shield) as engine, pytest.raises(UserError, match=sentence):
        engine.update(0)
    assert not hasattr(shield, "weights")
