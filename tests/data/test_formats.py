"""Prompts from files, tables and data sets: every format gives the same ones."""

import sys

import pytest

from repo.common.errors import UserError
from repo.data.prompts import Prompt, load_prompts
from tests.support.prompts import CHAT, load, write

datasets = pytest.importorskip("datasets")

TRAIN = [
    {"id": "a", "prompt": "What is bread?", "category": "food", "response": "Flour and water."},
    {"id": "b", "prompt": "One\u2028two", "category": "words", "response": None},
]
TEST = [{"id": "c", "prompt": "Where is the sea?", "category": "places", "response": None}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(records):
    return datasets.Dataset.from_list(records)


def as_parquet(folder):
    table(TRAIN).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def as_saved_dataset(folder):
    table(TRAIN).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder):
    datasets.DatasetDict(train=table(TRAIN), test=table(TEST)).save_to_disk(folder / "splits")
    return folder / "splits"


def as_folder_of_json_lines(folder):
    write(folder / "lines" / "train.jsonl", TRAIN)
    write(folder / "lines" / "test.jsonl", TEST)
    return folder / "lines"


def as_folder_of_parquet(folder):
    (folder / "tables").mkdir()
    table(TRAIN).to_parquet(folder / "tables" / "train-0.parquet")
    return folder / "tables"


WRITERS = [as_parquet, as_saved_dataset, as_saved_splits, as_folder_of_json_lines, as_folder_of_parquet]


@pytest.mark.parametrize("save", WRITERS)
def test_every_format_gives_the_prompts_of_the_json_lines(save, tmp_path):
    expected = load(tmp_path, *TRAIN)
    assert load_prompts(save(tmp_path)) == expected
    assert [p.id for p in expected] == ["a", "b"]
    assert expected[0] == Prompt("a", "What is bread?", "food", response="Flour and water.")


def test_conversations_are_the_same_from_every_format(tmp_path):
    records = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    table(records).to_parquet(tmp_path / "chat.parquet")
    assert load_prompts(tmp_path / "chat.parquet") == load(tmp_path, *records)


@pytest.mark.parametrize("save", [as_saved_splits, as_folder_of_json_lines])
def test_splits_are_chosen_in_the_name_or_by_default(save, tmp_path):
    folder = save(tmp_path)
    assert load_prompts(f"{folder}#test") == load_prompts(folder, split="test") == load(tmp_path, *TEST)
    assert load_prompts(f"{folder}#train", split="test") == load_prompts(folder)
    with pytest.raises(UserError, match=r"has no split 'dev'; there are: train, test"):
        load_prompts(f"{folder}#dev")


def test_configs_are_chosen_in_the_name(tmp_path):
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("one", "two"))
    write(tmp_path / "named" / "one.jsonl", TRAIN)
    write(tmp_path / "named" / "two.jsonl", TEST)
    (tmp_path / "named" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert [p.id for p in load_prompts(f"{tmp_path}/named#two/train")] == ["c"]
    with pytest.raises(UserError, match=r"#config/split.*available configs: \['one', 'two'\]"):
        load_prompts(tmp_path / "named")


def test_a_file_and_a_saved_dataset_have_no_splits_but_serve_as_any(tmp_path):
    path, saved = write(tmp_path / "p.jsonl", TRAIN), as_saved_dataset(tmp_path)
    assert load_prompts(path, split="test") == load_prompts(saved, split="test") == load_prompts(path)
    with pytest.raises(UserError, match="a file has no splits; leave out #test"):
        load_prompts(f"{path}#test")
    with pytest.raises(UserError, match="has no split 'test'; there are: none"):
        load_prompts(f"{saved}#test")


def test_a_name_with_a_hash_is_still_a_file(tmp_path):
    assert len(load_prompts(write(tmp_path / "set#1.jsonl", TRAIN))) == 2


def test_a_folder_named_like_a_format_is_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "json" / "train.jsonl", TRAIN)
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts("json")) == 2


@pytest.mark.parametrize("name", ["org/name", "org/name-2.5", "org/name#config/test"])
def test_a_hub_name_is_looked_up_on_the_hub(name):
    message = f"no such folder: '{name.split('#')[0]}', nor is it in the hub's cache"
    with pytest.raises(UserError, match=message) as error:
        load_prompts(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "data/typo.jsonl", "data/typo.parquet#test", "typo", "./data/typo"])
def test_what_is_no_hub_name_must_exist(name):
    with pytest.raises(UserError, match="prompt file not found: "):
        load_prompts(name)


def test_only_tables_need_the_datasets_package(tmp_path, monkeypatch):
    path, parquet = write(tmp_path / "p.jsonl", TRAIN), as_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_prompts(path)) == 2
    with pytest.raises(UserError, match="needs the package datasets: pip install datasets"):
        load_prompts(parquet)


@pytest.mark.parametrize("name", ["bad.parquet", "folder", "empty"])
def test_what_the_library_cannot_read_is_a_sentence(name, tmp_path):
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a"}\n{oops\n')
    with pytest.raises(UserError, match=name) as error:
        load_prompts(tmp_path / name)
    cause = {"bad.parquet": "magic bytes", "folder": "train.jsonl:2: not JSON", "empty": "any data files"}[name]
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_without_the_column_says_what_it_has(tmp_path):
    table([{"question": "a", "n": 1}]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column `prompt` or `messages`; it has: question, n"):
        load_prompts(tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet", column="question")[0].text == "a"


def test_bad_rows_are_told_by_row(tmp_path):
    table([{"prompt": "a"}, {"prompt": ""}]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet row 2: `prompt` must be a non-empty string"):
        load_prompts(tmp_path / "p.parquet")
