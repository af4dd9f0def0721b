"""Sequence-classification models of the user's own as reward and cost."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from repo import train
from repo.common.errors import UserError
from repo.data.prompts import Prompt
from repo.scoring.classifier import ClassifierScorer
from tests.support.tiny import make_tokenizer

TEXTS = ["What is bread?", "What is bread?", "Where is the mountain?", "Tell me a word."]
PROMPTS = [Prompt(text, text, "") for text in TEXTS]
RESPONSES = ["Flour, water and salt.", "", "By the sea, slowly.", "Harder words are words."]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A reward and a cost in one model, with a chat template; pad id = end id, as many published models have it."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), make_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=1,
        eos_token_id=1,
        bos_token_id=None,
        id2label={0: "helpful", 1: "harmful"},
        initializer_range=0.2,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """One label and no chat template: the texts are read as a pair."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), make_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("label", ["helpful", "harmful"])
def test_a_batch_scores_as_single_sequences_do(llama, label):
    scorer = ClassifierScorer(f"{llama}#{label}:logit", "cost", "cpu")
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(llama), make_tokenizer()
    for prompt, response, score in zip(TEXTS, RESPONSES, scorer(PROMPTS, RESPONSES), strict=True):
        text = f"<|user|>{prompt}<|end|><|assistant|>{response}<|end|>"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text).input_ids])).logits[0]
        assert torch.allclose(score, logits[["helpful", "harmful"].index(label)], atol=1e-5)


def test_a_model_without_a_pad_id_scores_a_batch(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    scorer = ClassifierScorer(f"{tmp_path}#harmful", "cost", "cpu")
    assert torch.equal(scorer(PROMPTS[:1] * 2, RESPONSES[:1] * 2), scorer(PROMPTS[:1], RESPONSES[:1]).repeat(2))


def test_without_a_chat_template_the_texts_are_a_pair(bert):
    scores = ClassifierScorer(str(bert), "reward", "cpu")(PROMPTS, RESPONSES)
    model, tokenizer = BertForSequenceClassification.from_pretrained(bert), make_tokenizer()
    with torch.no_grad():
        alone = model(**tokenizer(TEXTS[2], RESPONSES[2], return_tensors="pt")).logits[0, 0]
    assert torch.allclose(scores[2], alone, atol=1e-5)
    assert scores.unique().numel() == 4


def test_several_labels_need_a_choice(llama):
    with pytest.raises(UserError, match="must name one label as path#label; the model has harmful, helpful"):
        ClassifierScorer(str(llama), "reward", "cpu")


def test_a_folder_that_is_no_classifier_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"scoring.reward: cannot load .* as a classifier"):
        ClassifierScorer(str(tmp_path), "reward", "cpu")


def test_a_language_model_is_no_classifier(tiny_model):
    # transformers itself would load it with a random head
    with pytest.raises(
        UserError, match=r"cannot load .* as a classifier: ValueError: it lacks the weights score.weight"
    ):
        ClassifierScorer(str(tiny_model), "reward", "cpu")


def test_a_conversation_goes_through_the_chat_template(llama):
    turns = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bread"},
    )
    scorer = ClassifierScorer(f"{llama}#harmful:logit", "cost", "cpu")
    text = "<|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>Bread<|end|><|assistant|>Flour.<|end|>"
    with torch.no_grad():
        logits = scorer.model(torch.tensor([make_tokenizer()(text).input_ids])).logits[0]
    assert torch.allclose(scorer([Prompt("", "a transcript", "", (), turns)], ["Flour."])[0], logits[1], atol=1e-5)


def test_a_sequence_beyond_the_context_is_a_sentence(bert):
    scorer = ClassifierScorer(str(bert), "reward", "cpu")
    with pytest.raises(UserError, match=r"scoring.reward .* take \d+ tokens; its context is 512"):
        scorer(PROMPTS[:1], ["a word " * 600])


def test_the_head_gives_the_score_of_the_last_state(llama):
    scorer = ClassifierScorer(f"{llama}#harmful", "cost", "cpu")
    weight, bias = scorer.head()
    ids = torch.tensor([make_tokenizer()("<|user|>Hi<|end|><|assistant|>Yes").input_ids])  # ends with no pad id
    with torch.no_grad():
        state = scorer.trunk(ids).last_hidden_state[0, -1]
        logits = scorer.model(ids).logits[0]
        assert torch.allclose(state @ weight + bias, logits[1] - logits[0], atol=1e-5)
        weight, bias = ClassifierScorer(f"{llama}#harmful:logit", "cost", "cpu").head()
        assert torch.allclose(state @ weight + bias, logits[1], atol=1e-5)


def test_a_classifier_with_a_pooler_has_no_head_for_a_critic(bert):
    with pytest.raises(UserError, match="more than a linear head"):
        ClassifierScorer(str(bert), "cost", "cpu").head()


def test_a_run_trains_on_classifiers(llama, bert, tiny_arguments, tmp_path):
    options = [f"--scoring.reward={bert}", f"--scoring.cost={llama}#harmful", "--steps=1", "--evaluation.prompts=0"]
    train.run_command([*tiny_arguments, *options, f"--out={tmp_path / 'run'}"])
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    costs = ClassifierScorer(f"{llama}#harmful", "cost", "cpu")(
        [Prompt("", s["prompt"], "") for s in samples], [s["response"] for s in samples]
    )
    assert torch.allclose(costs, torch.tensor([s["cost"] for s in samples]), atol=1e-5)
