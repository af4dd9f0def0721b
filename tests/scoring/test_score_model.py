"""Score models in safe-rlhf's format: the text that they score, their weights, and folders that are none."""

import json

import pytest
import torch

from repo.common.errors import UserError
from repo.data.prompts import Prompt
from repo.scoring.classifier import load_model
from tests.support.score_models import (
    PROMPTS,
    RESPONSES,
    TEMPLATE,
    TEXTS,
    TURNS,
    close,
    direct,
    safe_rlhf_text,
    save_score_model,
)


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_score_model_scores_the_end_of_safe_rlhfs_own_format(backbone, tmp_path):
    model = save_score_model(tmp_path, backbone)
    texts = [safe_rlhf_text(p, r) for p, r in zip(TEXTS, RESPONSES, strict=True)]
    assert close(load_model(str(tmp_path), "reward", "cpu")(PROMPTS, RESPONSES), direct(model, texts)[:, 0])


def test_a_chat_template_is_used_where_there_is_one(tmp_path):
    model = save_score_model(tmp_path, template=TEMPLATE)
    texts = [f"[user]{p}[assistant]{r}" for p, r in zip(TEXTS, RESPONSES, strict=True)]
    scorer = load_model(str(tmp_path), "reward", "cpu")
    assert close(scorer(PROMPTS, RESPONSES), direct(model, texts)[:, 0])
    talk = scorer([Prompt("", "a transcript", "", (), TURNS)], ["Flour."])
    assert close(talk, direct(model, ["[user]Hi[assistant]Yes?[user]Bread[assistant]Flour."])[:, 0])


def test_every_turn_of_the_assistant_ends_in_safe_rlhfs_format(tmp_path):
    model = save_score_model(tmp_path)
    found = load_model(str(tmp_path), "reward", "cpu")([Prompt("", "a transcript", "", (), TURNS)], ["Flour."])
    text = "BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:Yes?</s>USER: Bread ASSISTANT:Flour.</s>"
    assert close(found, direct(model, [text])[:, 0])


def test_a_template_that_refuses_a_conversation_is_a_sentence(tmp_path):
    save_score_model(tmp_path, template="{{ raise_exception('no assistants') }}")
    with pytest.raises(UserError, match=r"scoring.cost .*: its chat template refuses a prompt: .*no assistants"):
        load_model(str(tmp_path), "cost", "cpu")(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("kind", "normalize", "by_hand"),
    [
        ("reward", True, lambda x: (x - 0.3) / 2),
        ("cost", True, lambda x: x / 2),
        ("critic", True, lambda x: x),
        ("reward", False, lambda x: x),
        ("cost", False, lambda x: x),
    ],
)
def test_scores_are_normalised_as_the_config_says(kind, normalize, by_hand, tmp_path):
    model = save_score_model(tmp_path, score_type=kind, do_normalize=normalize, mean=[0.3], var=[4.0])
    raw = direct(model, [safe_rlhf_text(TEXTS[0], RESPONSES[0])])[:, 0]
    assert close(load_model(str(tmp_path), "reward", "cpu")(PROMPTS[:1], RESPONSES[:1]), by_hand(raw))


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_read_from_every_form(form, bias, tmp_path):
    model = save_score_model(tmp_path, form=form, bias=bias)
    raw = direct(model, [safe_rlhf_text(TEXTS[3], RESPONSES[3])])[:, 0]
    assert close(load_model(str(tmp_path), "reward", "cpu")(PROMPTS[3:], RESPONSES[3:]), raw)


def test_one_of_several_scores_is_chosen_by_its_index(tmp_path):
    model = save_score_model(tmp_path, outputs=2, do_normalize=True, mean=[0.0, 1.0], var=[1.0, 4.0])
    with pytest.raises(UserError, match="must name one label as path#label; the model has 0, 1"):
        load_model(str(tmp_path), "reward", "cpu")
    raw = direct(model, [safe_rlhf_text(TEXTS[0], RESPONSES[0])])[:, 1]
    assert close(load_model(f"{tmp_path}#1", "reward", "cpu")(PROMPTS[:1], RESPONSES[:1]), (raw - 1) / 2)


def test_the_head_of_a_score_model_speaks_in_the_units_of_the_score(tmp_path):
    save_score_model(tmp_path, do_normalize=True, mean=[0.3], var=[4.0])
    (tmp_path / "scorer.json").write_text(json.dumps({"offset": 0.7, "scale": -3}))
    scorer = load_model(str(tmp_path), "reward", "cpu")
    ids = scorer.tokenizer(safe_rlhf_text(TEXTS[0], RESPONSES[0]), return_tensors="pt").input_ids
    weight, bias = scorer.head()
    with torch.no_grad():
        value = scorer.trunk(ids).last_hidden_state[0, -1] @ weight + bias
    assert bias.shape == ()
    assert torch.allclose(value, scorer(PROMPTS[:1], RESPONSES[:1])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_type": "harm"}, "score_type of the config must be reward, cost or critic; got 'harm'"),
        ({"num_hidden_layers": 3}, "as a score model: ValueError: it lacks the weights model.layers.2."),
        ({"architectures": ["LlamaForSequenceClassification"]}, "it lacks the weights score.weight"),
    ],
)
def test_a_folder_that_is_no_score_model_is_a_sentence(change, message, tmp_path):
    save_score_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path), "cost", "cpu")
    assert message in str(error.value)
