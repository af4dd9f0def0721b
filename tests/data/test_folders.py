"""Folders of data files, csv and JSON files: each row gives the prompt that it gives in a JSON lines file."""

import json

import pytest

from repo.common.errors import UserError
from repo.data.prompts import load_prompts
from tests.support.prompts import write

DATES = [{"prompt": "2024-01-02", "id": "2023-05-06"}, {"prompt": "2024-01-03", "id": "2023-05-07"}]
MIXED = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "one"}, {"prompt": "c", "answer": [1]}]
LARGE = [{"prompt": "a", "id": 2**63}, {"prompt": "b", "id": 2**63 + 1}]
LATE = [{"prompt": "x" * 1000}] * 11_000 + [{"messages": [{"role": "user", "content": "late"}], "category": "new"}]
LATE_NULL = [{"prompt": "x" * 1000, "category": None}] * 11_000 + [{"prompt": "late", "category": "text"}]


@pytest.mark.parametrize("records", [DATES, MIXED, LARGE, LATE, LATE_NULL], ids="dates mixed large late null".split())
def test_a_folder_gives_the_prompts_of_its_files(records, tmp_path):
    file = write(tmp_path / "folder" / "train.jsonl", records)
    prompts = load_prompts(tmp_path / "folder")
    assert prompts == load_prompts(file)
    assert [p.columns for p in prompts] == records


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("train/a.csv", "test/a.csv")])
def test_splits_come_from_the_names_of_files_and_folders(names, tmp_path):
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"prompt\n{name}\n" if path.suffix == ".csv" else json.dumps({"prompt": name}))
    for split, name in zip(("train", "test"), names, strict=True):
        (prompt,) = load_prompts(f"{tmp_path / 'folder'}#{split}")
        assert prompt.text == name


def test_a_csv_file_is_read_by_its_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('﻿prompt,id,answer\n"What is\nbread?",a,4\nAnd water?,,\n', encoding="utf-8")
    prompts = load_prompts(path)
    assert [p.text for p in prompts] == ["What is\nbread?", "And water?"]
    assert prompts[0].id == "a"
    assert prompts[0].columns["answer"] == "4"
    assert prompts[1].columns["answer"] is None
    tsv = tmp_path / "rows.tsv"
    tsv.write_text("question\tid\nWhat, and why?\tb\n")
    assert load_prompts(tsv, column="question")[0].text == "What, and why?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,id\na,b,c\n", r"a.csv:2: a row must have one cell for each of prompt, id"),
        ("a.csv", b"prompt,id\na\n", r"a.csv:2: a row must have one cell for each of prompt, id"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv: the header names the column 'prompt' twice"),
        ("a.csv", b"prompt\n\xe9\n", "a.csv: not csv in UTF-8"),
        ("a.csv", b"question\na\n", "a.csv has no column `prompt` or `messages`; it has: question"),
        (
            "a.txt",
            b"What is bread?\n",
            "a.txt:1: not JSON: .*; a data file is JSON lines, JSON .*, csv, tsv or parquet",
        ),
    ],
)
def test_what_cannot_be_read_is_told_with_the_formats(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts(tmp_path / name)


def test_a_json_file_may_hold_one_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert [p.text for p in load_prompts(path)] == ["a", "b"]
    assert load_prompts(path)[1].where == f"{path} item 2"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_column_that_is_asked_for_and_absent_is_an_error(form, tmp_path):
    records = [{"messages": [{"role": "user", "content": "a"}], "id": "1"}]
    path = write(tmp_path / "rows.jsonl", records)
    if form == "parquet":
        datasets, path = pytest.importorskip("datasets"), tmp_path / "rows.parquet"
        datasets.Dataset.from_list(records).to_parquet(path)
    with pytest.raises(UserError, match=r"has no column `question`; it has: messages, id"):
        load_prompts(path, column="question")
    assert load_prompts(path)[0].text == "a"


def test_a_column_that_some_records_lack_leaves_their_messages(tmp_path):
    records = [{"question": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    assert [p.text for p in load_prompts(write(tmp_path / "r.jsonl", records), column="question")] == ["a", "b"]
