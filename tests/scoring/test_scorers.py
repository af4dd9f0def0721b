"""The user's own scorers: safe-rlhf score models, functions under a time limit, manifests, and weighted sums."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from repo import train
from repo.assets import ensure
from repo.common.errors import UserError
from repo.config.schema import ScoringConfig
from repo.data.prompts import Prompt
from repo.scoring.classifier import ScoreModelScorer, load_model
from repo.scoring.embedded import HeadScorer
from repo.scoring.scorers import load_scorers
from tests.loop import scorers as functions

TEXTS = ["What is bread?", "What is bread?", "Where is the mountain?", "Tell me a word."]
PROMPTS = [Prompt(text, text, "") for text in TEXTS]
RESPONSES = ["Flour, water and salt.", "", "By the sea, slowly.", "Harder words are words."]
TURNS = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bread"},
)
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
FUNCTIONS = "tests.loop.scorers"
LENGTH_CHECK = {"prompt": "Say much.", "lower": "One two three.", "higher": "One."}


def make_scorer_tokenizer(template=None):
    """Not the policy's: other merges, other special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["BEGINNING OF CONVERSATION: USER: ASSISTANT: bread and water"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)


class ForScore(nn.Module):
    """What safe-rlhf saves: a backbone under its own name, and score_head."""

    def __init__(self, name, config, outputs, bias):
        super().__init__()
        self.name = name
        self.add_module(name, (LlamaModel if name == "model" else GPT2Model)(config))
        self.score_head = nn.Linear(32, outputs, bias=bias)

    def forward(self, ids):
        return self.score_head(getattr(self, self.name)(ids).last_hidden_state[0, -1])


def save_score_model(folder, backbone="llama", template=None, outputs=1, bias=True, form="safetensors", **config):
    """The model that was saved, in fp64."""
    tokenizer = make_scorer_tokenizer(template)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": None, "initializer_range": 0.2}
    torch.manual_seed(4)
    if backbone == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape, name, kind = LlamaConfig(**sizes, **ids), "model", "LlamaForScore"
    else:
        shape, name, kind = GPT2Config(n_embd=32, n_layer=2, n_head=4, **ids), "transformer", "GPT2ForScore"
    model = ForScore(name, shape, outputs, bias).eval()
    config = {"architectures": [kind], "score_dim": outputs, "bias": bias, "score_type": "reward", **config}
    (folder / "config.json").write_text(json.dumps({**shape.to_dict(), **config}))
    weights = model.state_dict()
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        files = {k: f"model-0000{1 + k.startswith('score')}-of-00002.safetensors" for k in weights}
        for file in set(files.values()):
            part = {k: v for k, v in weights.items() if files[k] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    tokenizer.save_pretrained(folder)
    return model.double()


def safe_rlhf_text(prompt, response):
    return f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}</s>"


@torch.no_grad()
def direct(model, texts):
    """(B, outputs) fp64 scores of whole texts, one forward each."""
    return torch.stack([model(torch.tensor([make_scorer_tokenizer()(text).input_ids])) for text in texts])


def close(found, expected):
    return found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


def scoring(**fields):
    """Both signals from functions, but for the given fields."""
    return load_scorers(ScoringConfig(**{"reward": f"{FUNCTIONS}:words", "cost": f"{FUNCTIONS}:words", **fields}), None)


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
        ({"num_hidden_layers": 3}, "as a score model: ValueError: it has no weights model.layers.2."),
        ({"architectures": ["LlamaForSequenceClassification"]}, "it has no weights score.weight"),
    ],
)
def test_a_folder_that_is_no_score_model_is_a_sentence(change, message, tmp_path):
    save_score_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path), "cost", "cpu")
    assert message in str(error.value)


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


def test_a_function_that_hangs_stops_the_run_in_time():
    both, started = scoring(cost=f"{FUNCTIONS}:hanging", timeout=0.2), time.monotonic()
    with pytest.raises(UserError) as error:
        both(PROMPTS, RESPONSES)
    assert time.monotonic() - started < 5
    assert str(error.value) == (
        "scoring.cost 'tests.loop.scorers:hanging' did not return within scoring.timeout=0.2 seconds"
    )


def test_a_function_that_hangs_does_not_keep_the_process_alive(tiny_arguments, tmp_path):
    options = [f"--scoring.cost={FUNCTIONS}:hanging", "--scoring.timeout=0.2", f"--out={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "repo.train", *tiny_arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)  # it sleeps for 60 seconds
    assert done.returncode == 2
    assert "did not return within scoring.timeout" in done.stderr


def test_an_interrupt_reaches_a_run_that_waits_for_a_function(interruptible):
    both, main, started = scoring(cost=f"{FUNCTIONS}:hanging"), threading.main_thread().ident, time.monotonic()
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        both(PROMPTS, RESPONSES)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "scoring.cost 'tests.loop.scorers:raising' raised KeyError: 'harm' ("),
        ("leaving", "raised SystemExit: no key ("),
        ("too_few", "must return 4 numbers; got shape (3,)"),
        ("not_a_number", "'tests.loop.scorers:not_a_number' gave nan for a response to the prompt 'What is bread?'"),
    ],
)
def test_a_function_that_fails_is_named_with_what_it_did(name, message):
    with pytest.raises(UserError) as error:
        scoring(cost={f"{FUNCTIONS}:words": 1, f"{FUNCTIONS}:{name}": 1e-9})(PROMPTS, RESPONSES)
    assert message in str(error.value)


def test_a_time_limit_beyond_the_clocks_range_is_no_limit():
    assert scoring(timeout=float("inf"))(PROMPTS, RESPONSES).costs.tolist() == [4, 0, 4, 4]


def test_a_function_is_used_in_the_units_of_its_manifest(monkeypatch):
    monkeypatch.setattr(functions.words, "manifest", {"units": "words", "offset": 4, "scale": -2}, raising=False)
    both = scoring(reward={f"{FUNCTIONS}:words": 3, f"{FUNCTIONS}:prompt_length": 1})
    assert both(PROMPTS[:2], RESPONSES[:2]).costs.tolist() == [0, 2]
    assert both.describe() == ("reward: 3 x words + tests.loop.scorers:prompt_length; cost: words (sign not checked)")


def test_a_function_with_the_wrong_sign_is_refused_until_it_is_flipped(monkeypatch):
    manifest = {"sign_check": LENGTH_CHECK}
    monkeypatch.setattr(functions.words, "manifest", manifest, raising=False)
    with pytest.raises(UserError, match=r"'tests.loop.scorers:words' has the wrong sign: .* got 3.000 and 1.000"):
        scoring()
    manifest["scale"] = -1
    both = scoring()
    assert both(PROMPTS[:1], RESPONSES[:1]).costs.tolist() == [-4]
    assert "sign not checked" not in both.describe()


def test_a_model_with_the_wrong_sign_is_refused_until_it_is_flipped(tmp_path):
    model = save_score_model(tmp_path)
    texts = [safe_rlhf_text(LENGTH_CHECK["prompt"], LENGTH_CHECK[k]) for k in ("lower", "higher")]
    raw = direct(model, texts)[:, 0]
    sign = 1 if raw[0] < raw[1] else -1
    for scale in (-sign, sign):
        (tmp_path / "scorer.json").write_text(json.dumps({"sign_check": LENGTH_CHECK, "scale": scale, "offset": 0.1}))
        if scale == -sign:
            with pytest.raises(UserError, match=r"scoring.cost .* has the wrong sign"):
                scoring(cost=str(tmp_path))
    found = scoring(cost=str(tmp_path))(PROMPTS[:1], RESPONSES[:1]).costs
    assert close(found, (direct(model, [safe_rlhf_text(TEXTS[0], RESPONSES[0])])[:, 0] - 0.1) / sign)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"scal": 2}, "its manifest has the unknown key 'scal'; did you mean 'scale'?"),
        ({"threshold": 2}, "has the unknown key 'threshold'; it takes units, offset, scale, sign_check"),
        ({"scale": 0}, "its manifest: scale must be a finite number other than 0; got 0"),
        ({"scale": "2"}, "scale must be a finite number other than 0; got '2'"),
        ({"offset": True}, "offset must be a finite number; got True"),
        ({"offset": float("inf")}, "offset must be a finite number; got inf"),
        ({"units": 3}, "units must be a string; got 3"),
        ({"sign_check": {"prompt": "a", "lower": "b"}}, "sign_check must be a mapping of prompt, lower and higher"),
        (["scale", 2], "its manifest must be a mapping with the keys units, offset, scale, sign_check; got list"),
    ],
)
def test_a_manifest_that_cannot_be_meant_is_refused(manifest, message, monkeypatch):
    monkeypatch.setattr(functions.words, "manifest", manifest, raising=False)
    with pytest.raises(UserError) as error:
        scoring()
    assert str(error.value).startswith("scoring.reward 'tests.loop.scorers:words': its manifest")
    assert message in str(error.value)


def test_a_manifest_file_that_is_not_json_is_refused(tmp_path):
    save_score_model(tmp_path)
    (tmp_path / "scorer.json").write_text("scale: 2")
    with pytest.raises(UserError, match=r"scoring.cost .*scorer.json is not JSON: Expecting value"):
        scoring(cost=str(tmp_path))


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
    said = (
        f"scoring.cost must be 'embedded', a model (folder or hub name) or 'module:function'; got {name!r}, which is no"
    )
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
    assert "cost: harm (sign not checked) + 0.5 x tests.loop.scorers:words (sign not checked)" in printed
