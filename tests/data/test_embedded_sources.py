"""Sources of prompts in the embedded assets, and their splits."""

import pytest

from repo.common.errors import UserError
from repo.data.sources import embedded_file, is_embedded


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
