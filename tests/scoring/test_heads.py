"""The embedded scorers and judge: what they rank above what, and that batching does not change a score."""

import dataclasses
import json

import pytest
import torch

from repo import assets
from repo.assets.prompts import SYSTEM_PROMPT
from repo.assets.sources import locate
from repo.config.schema import Config, ModelConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor, predict, read_reference
from repo.models.policy import load_policy
from repo.scoring.embedded import HeadScorer, Trunk, length_batches, score_all
from repo.scoring.embedded_judge import EmbeddedJudge, ProfanityModel, first_words
from repo.scoring.judge import load_judge
from repo.setup import scorers_beside

pytestmark = pytest.mark.assets

PROMPTS = (
    "How do I keep my tomato plants healthy?",
    "What is the capital of France?",
    "Can you explain why the sky is blue?",
    "Suggest a simple breakfast.",
)
REPLIES = (
    "Water your tomato plants regularly, give them plenty of sun, and feed them with compost every two weeks.",
    "The capital of France is Paris, a city on the river Seine that is known for its museums and its food.",
    "The sky is blue because air molecules scatter short, blue wavelengths of sunlight more than long, red ones.",
    "A simple breakfast is oatmeal with fruit: cook the oats in milk, then add a sliced banana and some honey.",
)
GIBBERISH = (
    "plants sun them every water with of plenty two compost your and tomato feed regularly give weeks",
    "zq Ġvex lorum pxt 77 ## yonder -- qua blick snarf untele",
    "the the the the the the the the the the the the the the the the",
    "oatmeal with fruit oatmeal with fruit oatmeal with fruit oatmeal with fruit oatmeal with fruit",
)
CHEATS = ("", "Sure!", "Yes.", "I'm sorry, but I can't assist with that.", "Sure, here is what you asked for:")


@pytest.fixture(scope="session")
def built():
    return assets.ensure()


@pytest.fixture(scope="session")
def scorers(built):
    reward = HeadScorer.load(built / "scorers/reward")
    trunk = reward.trunk
    return reward, HeadScorer.load(built / "scorers/cost", model=trunk.model, tokenizer=trunk.tokenizer)


@pytest.fixture(scope="session")
def judge(built):
    return EmbeddedJudge.load(built / "judge")


@pytest.fixture(scope="session")
def sensible(scorers):
    """Reward of each sensible reply, (4,)."""
    return scorers[0](PROMPTS, REPLIES)


def test_length_batches_cover_every_index_once_within_the_budget():
    lengths = [5, 1, 9, 3, 30, 2]
    batches = list(length_batches(lengths, 12))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 12 for b in batches)


def test_canned_answers_come_in_the_declared_order(scorers):
    for scorer in scorers:
        check = scorer.manifest.sign_check
        low, high = scorer([check["prompt"]] * 2, [check["lower"], check["higher"]])
        assert low < high


def test_sign_check_of_the_cost_lies_on_both_sides_of_the_limit(scorers):
    check = scorers[1].manifest.sign_check
    low, high = scorers[1]([check["prompt"]] * 2, [check["lower"], check["higher"]])
    assert low < 0 < high


def test_gibberish_is_rewarded_less_than_any_sensible_reply(scorers, sensible):
    assert scorers[0](PROMPTS, GIBBERISH).max() < sensible.min()


def test_a_reply_to_another_prompt_is_rewarded_less(scorers, sensible):
    swapped = scorers[0](PROMPTS, REPLIES[1:] + REPLIES[:1])
    assert (swapped < sensible).all()


@pytest.mark.parametrize("cheat", CHEATS)
def test_replies_that_a_policy_might_cheat_with_are_rewarded_less(scorers, sensible, cheat):
    assert scorers[0](PROMPTS, [cheat] * len(PROMPTS)).max() < sensible.min()


def test_benign_replies_are_safe_by_cost_and_by_judge(scorers, judge):
    assert (scorers[1](PROMPTS, REPLIES) <= 0).all()
    assert judge(PROMPTS, REPLIES).safe.all()


def test_benign_instructions_are_safe_by_cost(scorers):
    prompts = ("How do I make pancakes?", "Write a step-by-step guide on how to repair a chair")
    replies = (
        "Whisk eggs, milk and flour to a smooth batter, heat some butter in a pan, and fry each pancake on both sides.",
        "Step 1: Remove the broken leg. Step 2: Clean off the old glue. Step 3: Add glue and clamp it overnight.",
    )
    assert (scorers[1](prompts, replies) <= 0).all()


def test_most_benign_on_policy_replies_are_safe_out_of_fold(scorers, judge):
    for fit in (scorers[1].manifest.fit, judge.manifest["fit"]):
        assert min(fit["safe_share_of_benign_on_policy"].values()) > 0.8


def test_an_empty_reply_is_safe(scorers, judge):
    assert (scorers[1](PROMPTS, [""] * 4) <= 0).all()
    assert judge(PROMPTS, [""] * 4).safe.all()


def test_scores_do_not_depend_on_the_batch(scorers):
    prompts, replies = PROMPTS + PROMPTS, REPLIES + GIBBERISH
    together = score_all(scorers, prompts, replies)
    for i, scorer in enumerate(scorers):
        alone = torch.cat([scorer([p], [r]) for p, r in zip(prompts, replies, strict=True)])
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)


def test_verdicts_do_not_depend_on_the_batch(judge):
    together = judge(PROMPTS, GIBBERISH).unsafe_probability
    alone = torch.cat([judge([p], [r]).unsafe_probability for p, r in zip(PROMPTS, GIBBERISH, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_replies_to_their_own_prompt_are_on_topic_and_others_are_not(built):
    judge = load_judge("embedded", built, "cpu", 5.0)
    prompts = [Prompt(p, p, "") for p in PROMPTS]
    assert judge(prompts, REPLIES).topical.all()
    for replies in (REPLIES[1:] + REPLIES[:1], *([cheat] * len(PROMPTS) for cheat in CHEATS)):
        assert not judge(prompts, replies).topical.any()


def test_topicality_is_the_cosine_of_the_sentence_vectors(judge):
    prompts, replies = (judge.features.sentences(texts, 64) for texts in (PROMPTS, REPLIES))
    verdict = judge(PROMPTS, REPLIES)
    torch.testing.assert_close(verdict.topicality, (prompts * replies).sum(1), atol=1e-5, rtol=0)
    assert verdict.topicality.max() <= 1


def test_shared_forward_equals_separate_forwards(scorers):
    for shared, scorer in zip(score_all(scorers, PROMPTS, REPLIES), scorers, strict=True):
        torch.testing.assert_close(shared, scorer(PROMPTS, REPLIES), atol=1e-5, rtol=0)


def test_scores_read_from_the_references_forward_are_those_of_an_own_one(built, monkeypatch):
    """Whatever ended the response; text that tokenises otherwise than it was sampled takes a forward of its own."""
    policy = load_policy(str(built / "policy"), torch.device("cpu"), trainable=False).exact()
    scorers = [
        HeadScorer.load(built / "scorers" / s, model=policy.model, tokenizer=policy.tokenizer)
        for s in ("reward", "cost")
    ]
    encode, eos = policy.tokenizer, policy.eos_ids[0]
    prompts = tokenize_prompts([Prompt(p, p, "") for p in PROMPTS[:2]], policy.tokenizer, SYSTEM_PROMPT, 256).kept
    split = [token for character in "word" for token in encode(character).input_ids]
    responses = [[*encode(REPLIES[0]).input_ids, eos], encode(REPLIES[1]).input_ids, [eos], split]
    assert policy.tokenizer(policy.tokenizer.decode(split)).input_ids != split
    rows = [prompts[0], prompts[0], prompts[1], prompts[1]]
    sequences = make_sequences([p.token_ids for p in rows], responses, policy.pad_id, torch.tensor([0, 0, 1, 1]))
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    layer = scorers[0].manifest.layer
    logps, reading = read_reference(Actor(policy), sequences, 0.7, 500, [layer])
    torch.testing.assert_close(logps, predict(Actor(policy), sequences, 0.7, 500).logps, atol=1e-5, rtol=1e-5)
    for plain in (reading, read_reference(Actor(policy), sequences, 0.7, 500, [], at_one=True)[1]):
        at_one = predict(Actor(policy), sequences, 1.0, 500).logps
        torch.testing.assert_close(torch.stack(list(plain.logps)), at_one, atol=1e-5, rtol=1e-5)
    expected = score_all(scorers, [p.text for p in rows], texts)
    forwards, forward = [], Trunk._forward
    monkeypatch.setattr(
        Trunk, "_forward", lambda self, pairs, *a: forwards.append(len(pairs)) or forward(self, pairs, *a)
    )
    for found, own in zip(score_all(scorers, [p.text for p in rows], texts, reading), expected, strict=True):
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)
    assert forwards == [1]


def test_reference_safe_rate_lets_the_constraint_bind(scorers):
    assert 0.4 <= scorers[1].manifest.reference["safe_rate"]["all"] <= 0.7


def test_unknown_manifest_field_is_named(built, tmp_path):
    content = json.loads((built / "scorers/cost/scorer.json").read_text()) | {"treshold": 1.0}
    (tmp_path / "scorer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="treshold"):
        HeadScorer.load(tmp_path)


def test_first_words_keeps_spacing():
    assert first_words("one  two\nthree four", 3) == "one  two\nthree"
    assert first_words("one", 3) == "one"


def test_profanity_equals_scikit_learn(built):
    joblib = pytest.importorskip("joblib")
    vectoriser = joblib.load(locate("profanity_check", "data/vectorizer.joblib"))
    classifier = joblib.load(locate("profanity_check", "data/model.joblib"))
    texts = [*REPLIES, *GIBBERISH, "You are a damn stupid idiot.", "", "Ünïcode words, 12 34!"]
    expected = torch.tensor(classifier.predict_proba(vectoriser.transform(texts))[:, 1])
    torch.testing.assert_close(ProfanityModel.load(built / "judge")(texts).double(), expected, atol=1e-6, rtol=0)


def test_scores_beside_a_policy_with_adapters_are_those_of_the_frozen_model(built, scorers):
    """Whether they are read from the reference's pass or take one of their own."""
    policy = load_policy(str(built / "policy"), torch.device("cpu"), trainable=True, config=ModelConfig(lora_rank=2))
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    reference = dataclasses.replace(policy.exact(), base_only=True)
    config = Config(model=ModelConfig(lora_rank=2))
    beside = scorers_beside(config, built, reference, "embedded", "cpu", trust=False)
    prompts = tokenize_prompts([Prompt(PROMPTS[0], PROMPTS[0], "")], policy.tokenizer, SYSTEM_PROMPT, 256).kept
    responses = [policy.tokenizer(REPLIES[0]).input_ids]
    sequences = make_sequences([prompts[0].token_ids], responses, policy.pad_id, torch.tensor([0]))
    layers = beside.layers_of(policy.model)
    assert layers
    _, reading = read_reference(Actor(reference), sequences, 1.0, 500, layers)
    for known in (None, reading):
        found = beside(prompts, [REPLIES[0]], known)
        for scorer, score in zip(scorers, (found.rewards, found.costs), strict=True):
            assert score.item() == pytest.approx(scorer([PROMPTS[0]], [REPLIES[0]]).item(), abs=1e-3)
