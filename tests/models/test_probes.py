"""What is tried at load: token ids beyond the embedding, contexts that a rotary embedding bounds, ways of reading."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MptConfig, Phi3Config

from benchmarks.families.tiny_config import tiny_config
from repo import train
from repo.common.config_fields import config_field, context_of, head_size
from repo.common.errors import UserError
from repo.config.schema import RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.token_ids import embedding_rows, padding_id, plain_ids, require_embedded
from repo.models.actor import Actor
from repo.models.layout import choose_attention
from repo.models.policy import load_policy
from repo.rollout import decoding
from repo.rollout.decoding import WAYS, choose_decoding
from repo.rollout.sample import sample
from repo.scoring.classifier import ClassifierScorer
from tests.support.tiny import QUESTIONS, make_tokenizer, save_tiny_classifier, save_tiny_model

CPU = torch.device("cpu")


def add_token(folder, token, **roles):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token], **roles})
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_pad_token_beyond_the_embedding_is_replaced_by_a_valid_id(tmp_path, tiny_arguments):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = add_token(folder, "[PAD]", pad_token="[PAD]")
    policy = load_policy(str(folder), CPU, True)
    assert tokenizer.pad_token_id == embedding_rows(policy.model)
    assert policy.pad_id == policy.eos_ids[0]
    options = ["--steps=1", "--evaluation.prompts=0", f"--out={tmp_path / 'run'}"]
    train.run_command([*tiny_arguments, f"--model.path={folder}", *options])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["grad_norm"] > 0


def test_padding_takes_the_first_id_that_can_be_embedded():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    assert padding_id(model, (None, 40, -1, 7)) == 7
    assert padding_id(model, (99,)) == 0


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_template_tokens_beyond_the_embedding_are_a_sentence_at_start(tmp_path, tiny_arguments, extra):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = add_token(folder, "<|new|>")
    tokenizer.chat_template = "<|new|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"a prompt has token id \d+, but the model embeds \d+ tokens"):
        train.run_command([*tiny_arguments, f"--model.path={folder}", f"--out={tmp_path / 'run'}", *extra])


def test_a_classifier_whose_tokenizer_has_more_tokens_is_a_sentence_at_start(tmp_path):
    folder = save_tiny_classifier(tmp_path / "scorer")
    tokenizer = add_token(folder, "<|new|>")
    tokenizer.chat_template = "<|new|>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has token id \d+, but the model embeds"):
        ClassifierScorer(str(folder), "reward", "cpu")


def test_a_classifier_whose_batches_differ_scores_one_sequence_at_a_time(tmp_path, monkeypatch):
    folder = save_tiny_classifier(tmp_path / "scorer")
    prompts, responses = [Prompt("a", "What is bread?", "")] * 3, ["Yes.", "No..", "Yes."]
    right = ClassifierScorer(str(folder), "reward", "cpu")
    assert right.batches
    own = type(right.model).forward

    def mixed(self, input_ids=None, **rest):
        out = own(self, input_ids=input_ids, **rest)
        out.logits = out.logits + (len(input_ids) - 1)
        return out

    monkeypatch.setattr(type(right.model), "forward", mixed)
    wrong = ClassifierScorer(str(folder), "reward", "cpu")
    assert not wrong.batches
    got = wrong(prompts, responses)
    monkeypatch.undo()
    assert torch.allclose(got, right(prompts, responses), atol=1e-5)


def test_the_error_names_where_the_id_stands():
    require_embedded([0, 4], 5, "here")
    with pytest.raises(UserError, match=r"here has token id 5, but the model embeds 5 tokens, ids 0 to 4"):
        require_embedded([5], 5, "here")


LONG = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 20,
    },
}


def test_a_context_ends_where_the_factors_of_the_rotary_embedding_change(tmp_path, options):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    tokenizer = make_tokenizer()
    config = Phi3Config(vocab_size=len(tokenizer), **sizes, **LONG)
    assert context_of(config) == 20
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="leaves no room for a prompt in a context of 20"):
        train.run_command(
            [
                *options,
                f"--model.path={tmp_path / 'model'}",
                f"--out={tmp_path / 'run'}",
                "--rollout.max_response_tokens=20",
            ]
        )


def test_other_rotary_embeddings_do_not_bound_the_context():
    assert context_of(LlamaConfig(max_position_embeddings=64)) == 64
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    assert context_of(LlamaConfig(max_position_embeddings=64, rope_parameters=scaled)) == 64
    assert context_of(MambaConfig()) is None
    assert context_of(MptConfig(max_seq_len=34)) == 34


def test_fields_that_vary_by_layer_give_their_largest_value():
    config = tiny_config("gemma4_text", 50)
    with pytest.raises(RuntimeError):
        _ = config.head_dim
    assert (
        config_field(config, "head_dim")
        == head_size(config)
        == max(layer.head_dim for layer in config.per_layer_config)
    )
    assert config_field(config, "no_such_field", 3) == 3


def test_ids_of_a_trial_are_none_that_the_config_names():
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=6,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=1,
            eos_token_id=[2, 3],
            pad_token_id=0,
        )
    )
    assert {*plain_ids(model, 9, 9, "trial").flatten().tolist()} == {4, 5}


def test_reading_one_at_a_time_gives_the_same_passes_whatever_the_budget(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    AutoModelForCausalLM.from_config(tiny_config("rwkv", len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), CPU, True)
    assert policy.attention.describe().startswith("attention: one sequence at a time")
    assert "padding changes the states of RwkvModel by" in policy.attention.why
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS[:2]], policy.tokenizer, None, 99).kept
    sequences = sample(policy, prompts, 2, RolloutConfig(max_response_tokens=5), seed=0, step=0).sequences
    parts = Actor(policy).parts(sequences, torch.arange(4), 10**6)
    assert [len(part.order) for part in parts] == [1, 1, 1, 1]


def test_a_model_that_no_way_decodes_is_refused_by_name(tiny_model, monkeypatch):
    policy = load_policy(str(tiny_model), CPU, False)
    monkeypatch.setattr(decoding, "relative_difference", lambda got, expected: 0.5)
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM cannot sample here.*padded batch changes the logits .* 5.0e-01"
    ):
        choose_decoding(policy)


def test_a_model_that_reads_one_sequence_in_two_ways_is_refused(tiny_model):
    model = load_policy(str(tiny_model), CPU, False).model.base_model
    own = model.forward

    def forward(input_ids, position_ids=None, **rest):
        return own(input_ids=input_ids + (position_ids is not None), position_ids=position_ids, **rest)

    model.forward = forward
    with pytest.raises(
        UserError, match="LlamaModel cannot be trained here: padding changes the states of LlamaModel by"
    ):
        choose_attention(model, CPU, torch.float32)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_whose_gradients_depend_on_the_batch_is_not_padded(tiny_model, monkeypatch, trainable):
    model = load_policy(str(tiny_model), CPU, trainable).model
    monkeypatch.setattr(type(model.base_model), "_supports_attention_backend", False)
    own = model.base_model.forward

    def forward(input_ids, position_ids=None, **rest):
        out = own(input_ids=input_ids, position_ids=position_ids, **rest)
        if len(input_ids) > 1:
            out.last_hidden_state = 2 * out.last_hidden_state - out.last_hidden_state.detach()
        return out

    assert choose_attention(model, CPU, torch.float32).pads
    model.base_model.forward = forward
    chosen = choose_attention(model, CPU, torch.float32)
    assert not chosen.pads
    assert "padding changes the gradients of LlamaModel by 1.0e+00" in chosen.why
    assert all(p.requires_grad == trainable for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_decoding_samples_the_same(tiny_model, monkeypatch, way):
    policy = load_policy(str(tiny_model), CPU, False)
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    config = RolloutConfig(max_response_tokens=12)
    expected = sample(policy, prompts, 3, config, seed=0, step=0)
    monkeypatch.setitem(decoding._chosen, policy.model, way)
    got = sample(policy, prompts, 3, config, seed=0, step=0)
    assert got.texts == expected.texts
    assert torch.allclose(got.logps, expected.logps, atol=1e-4)
