"""Files of PKU-SafeRLHF, with the columns of its revisions, serve as prompts as they are."""

import gzip
import json
import lzma

import pytest

from repo.common.errors import UserError
from repo.data.prompts import load_prompts, tokenize_prompts
from tests.support.prompts import write

LABELS = ("better_response_id", "safer_response_id")
QUESTIONS = ("What is bread?", "And water?", "What is bread?", "What is bread?")


def first_revision(number, prompt):
    """Return a row of the first revisions; the response differs from row to row."""
    row = {"prompt": prompt, "response_0": f"Food {number}.", "response_1": "No."}
    return row | {"is_response_0_safe": True, "is_response_1_safe": False} | dict.fromkeys(LABELS, number % 2)


def later_revision(number, prompt):
    """Return a row of the later revisions, which also have sources, severities, categories and hashes."""
    row = {"prompt_source": "Alpaca3-70B", "response_0_source": "Alpaca3-70B", "response_1_source": "WizardLM-30B"}
    for side in (0, 1):
        row[f"response_{side}_harm_category"] = {"Endangering National Security": False, "Cybercrime": bool(side)}
        row |= {f"response_{side}_severity_level": 2 * side, f"response_{side}_sha256": f"{number}{side}"}
    return first_revision(number, prompt) | row


def as_lines(path, rows):
    return write(path / "train.jsonl", rows)


def as_xz(path, rows):
    (path / "train.jsonl.xz").write_bytes(lzma.compress(as_lines(path, rows).read_bytes()))
    return path / "train.jsonl.xz"


def as_gz(path, rows):
    (path / "train.jsonl.gz").write_bytes(gzip.compress(as_lines(path, rows).read_bytes()))
    return path / "train.jsonl.gz"


def as_parquet(path, rows):
    pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return path / "train.parquet"


@pytest.mark.parametrize("revision", [first_revision, later_revision])
@pytest.mark.parametrize("save", [as_lines, as_xz, as_gz, as_parquet])
def test_a_prompt_of_several_pairs_is_kept_once_with_its_first_row(save, revision, tmp_path, tokenizer):
    path = save(tmp_path, [revision(n, prompt) for n, prompt in enumerate(QUESTIONS)])
    prompts = load_prompts(path)
    assert [p.text for p in prompts] == list(QUESTIONS)
    assert [p.response for p in prompts] == [None] * 4  # a pair is no supervised answer
    done = tokenize_prompts(prompts, tokenizer, None, 256)
    assert [p.text for p in done.kept] == ["What is bread?", "And water?"]
    assert done.dropped == {"repeated": 2}
    assert done.kept[0].columns["response_0"] == "Food 0."
    assert done.kept[0].columns["is_response_1_safe"] is False


@pytest.mark.parametrize("save", [as_lines, as_xz, as_parquet])
def test_a_file_without_prompts_lists_the_columns_it_has(save, tmp_path):
    rows = [{name: value for name, value in first_revision(0, "a").items() if name != "prompt"}]
    wanted = "has no column `prompt` or `messages`; it has: response_0, response_1, is_response_0_safe, "
    with pytest.raises(UserError, match=wanted + "is_response_1_safe, better_response_id, safer_response_id$"):
        load_prompts(save(tmp_path, rows))


def test_a_row_at_fault_in_a_compressed_file_is_told_by_its_line(tmp_path):
    path = as_xz(tmp_path, [first_revision(0, "a"), first_revision(1, " ")])
    with pytest.raises(UserError, match=r"train.jsonl.xz:2: `prompt` must be a non-empty string"):
        load_prompts(path)


@pytest.mark.parametrize("suffix", ["xz", "gz"])
def test_a_file_that_is_not_so_compressed_is_a_sentence(suffix, tmp_path):
    (tmp_path / f"plain.jsonl.{suffix}").write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(UserError, match=rf"plain.jsonl.{suffix}: not a .{suffix} file: "):
        load_prompts(tmp_path / f"plain.jsonl.{suffix}")
    whole = {"xz": lzma, "gz": gzip}[suffix].compress(b'{"prompt": "a"}\n' * 50)
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(whole[:-12])
    (tmp_path / f"torn.jsonl.{suffix}").write_bytes(whole[:14] + b"\xff" * 8 + whole[22:])
    for name in ("cut", "torn"):
        with pytest.raises(UserError, match=rf"{name}.jsonl.{suffix}: not a .{suffix} file: "):
            load_prompts(tmp_path / f"{name}.jsonl.{suffix}")
