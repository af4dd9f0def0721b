"""Sources of prompts in the embedded assets: their splits and their system message."""

import dataclasses

import pytest

from repo.assets.prompts import SYSTEM_PROMPT
from repo.common.errors import UserError
from repo.config.schema import Config, DataConfig
from repo.setup import embedded_file, is_embedded, system_prompt_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts").mkdir()
    for split in ("train", "valid", "eval"):
        (tmp_path / "prompts" / f"{split}.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(("source", "file"), [("embedded", "train"), ("embedded#valid", "valid")])
def test_a_source_names_its_split_or_gets_the_default(folder, source, file):
    assert embedded_file(folder, source, "train") == str(folder / "prompts" / f"{file}.jsonl")


def test_an_unknown_split_is_an_error_that_lists_those_present(folder):
    with pytest.raises(UserError, match=r"no split 'test'; they have eval, train, valid"):
        embedded_file(folder, "embedded#test", "train")


def test_only_embedded_prompts_are_embedded():
    assert is_embedded("embedded")
    assert is_embedded("embedded#valid")
    assert not is_embedded("embedded.jsonl")
    assert not is_embedded("org/embedded#train")


def test_the_automatic_system_message_is_for_embedded_prompts_alone():
    config = Config(data=DataConfig(train="mine.jsonl"))
    assert system_prompt_of(config, "mine.jsonl") is None
    assert system_prompt_of(config, "embedded") == system_prompt_of(config, "embedded#valid") == SYSTEM_PROMPT


@pytest.mark.parametrize("given", [None, "Be brief."])
def test_a_system_message_of_ones_own_is_for_all_prompts(given):
    config = Config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, system_prompt=given))
    assert system_prompt_of(config, "embedded") == system_prompt_of(config, "mine.jsonl") == given
