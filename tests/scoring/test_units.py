"""Units of a classifier's score, its context, and LoRA folders as scorers."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
)

from repo.common.errors import UserError
from repo.config.schema import ScoringConfig
from repo.data.prompts import Prompt
from repo.scoring.classifier import ClassifierScorer, load_model
from repo.scoring.scorers import load_scorers
from tests.support.score_models import FUNCTIONS, save_score_model
from tests.support.tiny import make_tokenizer

PROMPTS = [Prompt("a", "What is bread?", ""), Prompt("b", "Where is the mountain?", "")]
RESPONSES = ["Flour, water and salt.", "By the sea, slowly."]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NEAR = {"atol": 1e-5}


def save(folder, shape=BertConfig, **fields):
    """Save a small classifier and return its folder."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(3)
    config = shape(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES, **fields)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def score(name):
    return ClassifierScorer(str(name), "cost", "cpu")(PROMPTS, RESPONSES)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    labels = {"id2label": {0: "good", 1: "harmful", 2: "a:b"}, "label2id": {"good": 0, "harmful": 1, "a:b": 2}}
    return save(tmp_path_factory.mktemp("three"), **labels)


def test_a_softmax_head_gives_the_log_odds_of_the_label(three):
    logits = torch.stack([score(f"{three}#{label}:logit") for label in ("good", "harmful", "a:b")], -1)
    p = logits.double().softmax(-1)[:, 1].float()
    assert torch.allclose(score(f"{three}#harmful"), (p / (1 - p)).log(), **NEAR)
    assert torch.allclose(score(f"{three}#harmful:logodds"), (p / (1 - p)).log(), **NEAR)
    assert torch.allclose(score(f"{three}#harmful:prob"), p, **NEAR)
    assert torch.allclose(score(f"{three}#a:b:prob"), logits.softmax(-1)[:, 2], **NEAR)
    assert (score(f"{three}#harmful") > 0).tolist() == (p > 0.5).tolist()


def test_log_odds_stay_finite_where_the_probability_is_zero_or_one(three):
    scorer = ClassifierScorer(f"{three}#harmful", "cost", "cpu")
    assert scorer._read(torch.tensor([[0.0, 300.0, 0.0], [300.0, 0.0, 0.0]])).tolist() == pytest.approx(
        [299.3, -300], abs=0.1
    )


def test_independent_labels_give_their_own_odds(tmp_path):
    folder = save(tmp_path, num_labels=3, problem_type="multi_label_classification")
    logit = score(f"{folder}#LABEL_1:logit")
    assert torch.equal(score(f"{folder}#LABEL_1"), logit)
    assert torch.allclose(score(f"{folder}#LABEL_1:prob"), logit.sigmoid(), **NEAR)


def test_one_output_is_raw_and_a_regression_has_no_probability(tmp_path):
    one = save(tmp_path / "one", num_labels=1)
    assert torch.equal(score(one), score(f"{one}#LABEL_0:logit"))
    assert torch.allclose(score(f"{one}#LABEL_0:prob"), score(one).sigmoid(), **NEAR)
    several = save(tmp_path / "several", num_labels=2, problem_type="regression")
    assert torch.equal(score(f"{several}#LABEL_1"), score(f"{several}#LABEL_1:logit"))
    with pytest.raises(UserError, match="the unit after # and the label must be logit; got 'prob'"):
        score(f"{several}#LABEL_1:prob")


def test_an_unknown_unit_is_an_error(three):
    with pytest.raises(UserError, match="must be logit or prob or logodds; got 'odds'"):
        score(f"{three}#harmful:odds")
    with pytest.raises(UserError, match="must name one label as path#label; the model has a:b, good, harmful"):
        score(f"{three}#bad:prob")


def test_the_start_line_says_the_unit(three):
    config = ScoringConfig(reward=f"{FUNCTIONS}:words", cost=f"{three}#harmful")
    text = load_scorers(config, None).describe()
    assert f"{three}#harmful (log-odds, 0 = as likely as not of 'harmful')" in text


def test_a_head_of_three_labels_is_no_linear_function_of_the_states(tmp_path):
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=3, pad_token_id=0, **SIZES)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no linear function of its last states; name it path#label:logit"):
        ClassifierScorer(f"{tmp_path}#LABEL_1", "cost", "cpu").head()
    assert ClassifierScorer(f"{tmp_path}#LABEL_1:logit", "cost", "cpu").head()[0].shape == (32,)


KINDS = "roberta xlm-roberta camembert data2vec-text mpnet longformer ibert bert".split()


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_what_the_model_can_read(kind, tmp_path):
    from transformers import CONFIG_MAPPING

    fields = {"attention_window": 4} if kind == "longformer" else {}
    folder = save(tmp_path, CONFIG_MAPPING[kind], max_position_embeddings=66, num_labels=1, pad_token_id=1, **fields)
    scorer = ClassifierScorer(str(folder), "cost", "cpu")
    assert scorer.context == (66 if kind == "bert" else 64)
    ids = torch.full((1, scorer.context), 7)
    assert scorer.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_prompts_that_do_not_fit_are_told_at_the_start(tmp_path):
    folder = save(tmp_path, RobertaConfig, max_position_embeddings=34, num_labels=1, pad_token_id=1)
    scorer = ClassifierScorer(str(folder), "cost", "cpu")
    assert scorer.check_prompts(PROMPTS, 1) is None
    assert "reads at most 32 tokens; the longest prompt takes" in scorer.check_prompts(PROMPTS, 32)
    with pytest.raises(UserError, match=r"a prompt takes \d+ tokens; its context is 32"):
        scorer.check_prompts([Prompt("a", "bread " * 40, "")], 1)


def test_a_classifiers_template_that_leaves_out_text_is_an_error(three, tmp_path):
    scorer = ClassifierScorer(f"{three}#harmful", "cost", "cpu")
    scorer.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match=r"scoring.cost .*: its chat template leaves out the text of a prompt's turn 1"):
        scorer.check_prompts(PROMPTS, 1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.2, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(base, folder, outputs=1, **fields):
    """Save a LoRA classifier on a base with weights that change the output; return it as trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", **fields)
    model = peft.get_peft_model(model, config).eval()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_lora_folder_is_merged_into_the_base_that_it_names(outputs, language_model, tmp_path):
    model = adapter(language_model, tmp_path, outputs)
    name = str(tmp_path) if outputs == 1 else f"{tmp_path}#LABEL_2:logit"
    scorer = load_model(name, "reward", "cpu")
    assert not any("lora" in part for part, _ in scorer.model.named_parameters())
    for prompt, response, found in zip(PROMPTS, RESPONSES, scorer(PROMPTS, RESPONSES), strict=True):
        ids = make_tokenizer()(f"<|user|>{prompt.text}<|end|><|assistant|>{response}<|end|>").input_ids
        with torch.no_grad():
            assert torch.allclose(found, model(input_ids=torch.tensor([ids])).logits[0, outputs - 1], **NEAR)


def test_a_lora_folder_without_its_head_or_base_is_an_error(language_model, tmp_path):
    adapter(language_model, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    rest = {name: weight for name, weight in weights.items() if "score" not in name}
    save_file(rest, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"cannot load .* as a classifier: ValueError: it lacks the weights score.weight"
    ):
        load_model(str(tmp_path), "reward", "cpu")
    file.write_text(json.dumps(content | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        load_model(str(tmp_path), "reward", "cpu")


def test_a_lora_folder_on_a_score_model_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    (tmp_path / "base").mkdir()
    save_score_model(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), "cost", "cpu").model
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    base, merged = (load_model(str(tmp_path / name), "cost", "cpu")(PROMPTS, RESPONSES) for name in ("base", "lora"))
    assert (base - merged).abs().max() > 1e-4
