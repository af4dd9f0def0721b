"""Manifests: the units and the sign of a scorer."""

import json

import pytest

from repo.common.errors import UserError
from tests.support import scorers as functions
from tests.support.score_models import (
    FUNCTIONS,
    LENGTH_CHECK,
    PROMPTS,
    RESPONSES,
    TEXTS,
    close,
    direct,
    safe_rlhf_text,
    save_score_model,
    scoring,
)


def test_a_function_is_used_in_the_units_of_its_manifest(monkeypatch):
    monkeypatch.setattr(functions.words, "manifest", {"units": "words", "offset": 4, "scale": -2}, raising=False)
    both = scoring(reward={f"{FUNCTIONS}:words": 3, f"{FUNCTIONS}:prompt_length": 1})
    assert both(PROMPTS[:2], RESPONSES[:2]).costs.tolist() == [0, 2]
    assert both.describe() == (
        "reward: 3 x words + tests.support.scorers:prompt_length; cost: words (sign not checked)"
    )


def test_a_function_with_the_wrong_sign_is_refused_until_it_is_flipped(monkeypatch):
    manifest = {"sign_check": LENGTH_CHECK}
    monkeypatch.setattr(functions.words, "manifest", manifest, raising=False)
    with pytest.raises(UserError, match=r"'tests.support.scorers:words' has the wrong sign: .* got 3.000 and 1.000"):
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
    assert str(error.value).startswith("scoring.reward 'tests.support.scorers:words': its manifest")
    assert message in str(error.value)


def test_a_manifest_file_that_is_not_json_is_refused(tmp_path):
    save_score_model(tmp_path)
    (tmp_path / "scorer.json").write_text("scale: 2")
    with pytest.raises(UserError, match=r"scoring.cost .*scorer.json is not JSON: Expecting value"):
        scoring(cost=str(tmp_path))
