"""Prompts: every format gives the same ones, conversations keep their turns, examples are the template's own tokens."""

import dataclasses
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repo.common.errors import UserError
from repo.common.seeds import generator
from repo.data.prompts import Prompt, batch_at, encode_prompt, load_prompts, tokenize_examples, tokenize_prompts

from .tiny import make_tokenizer

datasets = pytest.importorskip("datasets")

TRAIN = [
    {"id": "a", "prompt": "What is bread?", "category": "food", "response": "Flour and water."},
    {"id": "b", "prompt": "One\u2028two", "category": "words", "response": None},
]
TEST = [{"id": "c", "prompt": "Where is the sea?", "category": "places", "response": None}]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is bread?"},
    {"role": "assistant", "content": "Food."},
    {"role": "user", "content": "And water?"},
]
ANSWER = {"role": "assistant", "content": "A river."}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def load(tmp_path, *records, **options):
    return load_prompts(write(tmp_path / "prompts.jsonl", records), **options)


def without_template():
    plain = make_tokenizer()
    plain.chat_template = None
    return plain


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
    with pytest.raises(UserError, match=f"cannot read {name} as name.*on the Hub") as error:
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
    with pytest.raises(UserError, match=f"cannot read .*{name}") as error:
        load_prompts(tmp_path / name)
    cause = {"bad.parquet": "magic bytes", "folder": "JSON parse error", "empty": "any data files"}[name]
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_without_the_column_says_what_it_has(tmp_path):
    table([{"question": "a", "n": 1}]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="no column `prompt` or `messages`; it has: question, n"):
        load_prompts(tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet", column="question")[0].text == "a"


def test_a_conversation_keeps_its_turns_and_is_shown_as_a_transcript(tmp_path):
    (prompt,) = load(tmp_path, {"prompt": CHAT})
    assert prompt.conversation == CHAT
    assert prompt.text == "system: Be kind.\nuser: What is bread?\nassistant: Food.\nuser: And water?"
    assert prompt.response is None


def test_a_single_user_turn_is_the_same_prompt_as_its_text(tmp_path):
    turn = {"role": "user", "content": "What is bread?"}
    assert load(tmp_path, {"messages": [turn]}) == load(tmp_path, {"prompt": "What is bread?"})
    assert load(tmp_path, {"prompt": "What is bread?"})[0].conversation == [turn]


def test_the_column_comes_before_messages(tmp_path):
    assert load(tmp_path, {"prompt": "x", "messages": CHAT})[0].text == "x"
    assert load(tmp_path, {"prompt": None, "messages": CHAT})[0].conversation == CHAT
    assert load(tmp_path, {"prompt": "x", "chat": CHAT}, column="chat")[0].conversation == CHAT


def test_a_trailing_answer_is_the_supervised_response(tmp_path):
    (prompt,) = load(tmp_path, {"messages": [*CHAT, ANSWER]})
    assert prompt.conversation == CHAT
    assert prompt.response == "A river."
    assert load(tmp_path, {"messages": [CHAT[1], ANSWER]}) == load(
        tmp_path, {"prompt": CHAT[1]["content"], "response": "A river."}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts in"),
        ("{oops\n", ":1: not JSON: Expecting property name"),
        ('{"prompt": "a"}\n{"text": "b"}\n', ":2: `prompt` must be a non-empty string or a list of .*; got None"),
        ('{"prompt": " "}\n', ":1: `prompt` must be a non-empty string or a list of role and content; got ' '"),
        ('{"prompt": {"a": 1}}\n', "`prompt` must be .*; got {'a': 1}"),
        ('{"messages": []}\n', ":1: `messages` must be a non-empty string or a list of role and content; got "),
        ('{"messages": ["a"]}\n', "`messages` turn 1: `role` must be system, user or assistant; got None"),
        ('{"messages": [{"role": "tool", "content": "a"}]}\n', "turn 1: `role` must be .*; got 'tool'"),
        ('{"messages": [{"role": "user", "content": " "}]}\n', "turn 1: `content` must be a non-empty string; got ' '"),
        ('{"messages": [{"role": "user"}]}\n', "turn 1: `content` must be a non-empty string; got None"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "`messages` must end with a user's turn"),
        ('{"messages": [{"role": "system", "content": "a"}]}\n', "`messages` must end with a user's turn"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', ":2: same id 'x' as .*:1$"),
        ("[1]\n", r":1: must be an object with `prompt`; got \[1\]"),
    ],
)
def test_bad_lines_are_told_by_line_and_field(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_a_response_beside_a_trailing_answer_is_ambiguous(tmp_path):
    with pytest.raises(UserError, match="must end with a user's turn, or without `response` with one answer to it"):
        load(tmp_path, {"messages": [*CHAT, ANSWER], "response": "Another."})


def test_bad_rows_are_told_by_row(tmp_path):
    table([{"prompt": "a"}, {"prompt": ""}]).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet row 2: `prompt` must be a non-empty string"):
        load_prompts(tmp_path / "p.parquet")


def test_a_line_in_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(UserError, match=":2: not JSON: 'utf-8' codec can't decode byte 0xe9"):
        load_prompts(path)


def test_line_separators_inside_a_prompt_do_not_end_the_line(tmp_path):
    assert load(tmp_path, {"prompt": "one\u2028two\u0085three", "id": None})[0].text == "one\u2028two\u0085three"


def test_missing_ids_come_from_the_text(tmp_path):
    first, second = load(tmp_path, {"prompt": "hello"}, {"prompt": "bye", "id": 7})
    assert len(first.id) == 16
    assert second.id == "7"


def test_repeated_prompts_without_ids_are_dropped_and_counted(tmp_path, tokenizer):
    prompts = load(tmp_path, {"prompt": "bread"}, {"prompt": "water"}, {"prompt": "bread"}, {"prompt": "bread"})
    found = tokenize_prompts(prompts, tokenizer, None, 20)
    assert [p.text for p in found.kept] == ["bread", "water"]
    assert found.dropped == {"repeated": 2}


def test_long_prompts_are_dropped_and_counted(tokenizer):
    prompts = [Prompt("a", "bread", ""), Prompt("b", "bread " * 50, ""), Prompt("a", "bread", "")]
    found = tokenize_prompts(prompts, tokenizer, None, 20)
    assert [p.id for p in found.kept] == ["a"]
    assert found.report() == "dropped: 1 longer than 20 tokens, 1 repeated"
    assert tokenize_prompts(prompts[:1], tokenizer, None, 20).report() == "dropped: none"
    with pytest.raises(UserError, match="no prompt is left of 3; dropped: 2 longer than 2 tokens, 1 repeated"):
        tokenize_prompts(prompts, tokenizer, None, 2)


def test_prompts_end_where_the_response_begins(tokenizer):
    (prompt,) = tokenize_prompts([Prompt("a", "bread", "")], tokenizer, "Be kind.", 99).kept
    assert tokenizer.decode(prompt.token_ids) == "<|system|>Be kind.<|end|><|user|>bread<|end|><|assistant|>"


def test_tokenising_changes_nothing_but_the_tokens(tokenizer, tmp_path):
    (prompt,) = load(tmp_path, {"messages": [*CHAT, ANSWER], "category": "food"})
    (tokenized,) = tokenize_prompts([prompt], tokenizer, None, 99).kept
    assert dataclasses.replace(tokenized, token_ids=()) == prompt


def test_a_conversation_goes_through_the_template_whole_and_keeps_its_own_system_message(tokenizer, tmp_path):
    own, none = load(tmp_path, {"messages": CHAT}, {"messages": CHAT[1:]})
    rest = "<|user|>What is bread?<|end|><|assistant|>Food.<|end|><|user|>And water?<|end|><|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, own, "Be brief.")) == f"<|system|>Be kind.<|end|>{rest}"
    assert tokenizer.decode(encode_prompt(tokenizer, none, "Be brief.")) == f"<|system|>Be brief.<|end|>{rest}"
    assert tokenizer.decode(encode_prompt(tokenizer, none)) == rest


def test_without_a_template_a_question_is_bare_and_a_conversation_a_transcript(tmp_path):
    plain = without_template()
    question, chat = load(tmp_path, {"prompt": "What is bread?"}, {"messages": CHAT[1:]})
    assert plain.decode(encode_prompt(plain, question)) == "What is bread?"
    assert plain.decode(encode_prompt(plain, question, "Be kind.")) == "Be kind.\nWhat is bread?"
    turns = "user: What is bread?\nassistant: Food.\nuser: And water?\nassistant:"
    assert plain.decode(encode_prompt(plain, chat)) == turns
    assert plain.decode(encode_prompt(plain, chat, "Be kind.")) == f"system: Be kind.\n{turns}"


def test_a_template_that_refuses_a_prompt_is_a_sentence(tmp_path):
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match="the model's chat template refuses a prompt: .*no system message"):
        tokenize_prompts(load(tmp_path, {"messages": CHAT}), strict, None, 99)


def test_examples_are_the_templates_own_tokens_up_to_the_end_of_the_turn(tokenizer, tmp_path):
    prompts = load(tmp_path, {"messages": [*CHAT, ANSWER]}, {"prompt": "bread", "response": "Flour."})
    found = tokenize_examples(prompts, tokenizer, None, 99)
    for prompt, example in zip(prompts, found.kept, strict=True):
        turns = [*prompt.conversation, {"role": "assistant", "content": prompt.response}]
        assert [*example.prompt_ids, *example.response_ids] == tokenizer.apply_chat_template(turns)["input_ids"]
        assert list(example.prompt_ids) == encode_prompt(tokenizer, prompt)
        assert tokenizer.decode(example.response_ids) == f"{prompt.response}<|end|>"


def test_what_a_template_writes_after_the_end_of_a_turn_is_no_part_of_the_response(tmp_path):
    chatml = make_tokenizer()
    chatml.chat_template = chatml.chat_template.replace("<|end|>", "<|end|>\n")
    (example,) = tokenize_examples(load(tmp_path, {"prompt": "bread", "response": "Food."}), chatml, None, 99).kept
    assert chatml.decode(example.prompt_ids) == "<|user|>bread<|end|>\n<|assistant|>"
    assert chatml.decode(example.response_ids) == "Food.<|end|>"


@pytest.mark.parametrize("template", [None, "{{ messages | length }} {{ messages[0]['content'] }}"])
def test_without_a_template_that_continues_the_prompt_the_response_is_its_text_and_an_end(template, tmp_path):
    other = make_tokenizer()
    other.chat_template = template
    prompts = load(tmp_path, {"prompt": "bread", "response": "Food."})
    (example,) = tokenize_examples(prompts, other, None, 99).kept
    assert list(example.prompt_ids) == encode_prompt(other, prompts[0])
    assert other.decode(example.response_ids) == "Food.<|end|>"
    pad = other.pad_token_id
    assert tokenize_examples(prompts, other, None, 99, [pad]).kept[0].response_ids == (*example.response_ids[:-1], pad)


def test_any_of_the_models_end_tokens_ends_a_response(tmp_path):
    gemma = make_tokenizer()
    prompts = load(tmp_path, {"prompt": "bread", "response": "Food."})
    end, gemma.eos_token = gemma.eos_token_id, "<|pad|>"
    (example,) = tokenize_examples(prompts, gemma, None, 99, [gemma.eos_token_id, end]).kept
    assert gemma.decode(example.response_ids) == "Food.<|end|>"


def test_examples_are_limited_as_a_whole_and_counted_by_pair(tokenizer, tmp_path):
    short = {"prompt": "bread", "response": "Food."}
    records = [short, short, {**short, "response": "Flour."}, {**short, "response": "water " * 40}]
    found = tokenize_examples(load(tmp_path, *records), tokenizer, None, 30)
    assert len(found.kept) == 2
    assert found.report() == "dropped: 1 repeated, 1 longer than 30 tokens"
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in found.kept)
    assert len(tokenize_examples(load(tmp_path, *records), tokenizer, None, longest).kept) == 2
    assert len(tokenize_examples(load(tmp_path, *records), tokenizer, None, longest - 1).kept) < 2


@pytest.mark.parametrize("response", [None, ""])
def test_an_example_without_a_response_is_named(response, tokenizer, tmp_path):
    with pytest.raises(UserError, match="prompt 'x' has no `response`"):
        tokenize_examples(load(tmp_path, {"id": "x", "prompt": "a", "response": response}), tokenizer, None, 99)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 9), st.sampled_from(["epoch", "ptx"]))
def test_batches_visit_every_item_once_per_epoch_and_depend_on_the_step_only(count, size, seed, stream):
    items = list(range(count))
    steps = -(-3 * count // size)
    batches = [batch_at(items, step, size, seed, stream) for step in range(steps)]
    assert batches == [batch_at(items, step, size, seed, stream) for step in reversed(range(steps))][::-1]
    seen = [item for batch in batches for item in batch]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == items


def test_prompts_come_in_the_order_of_their_stream():
    def order(stream, epoch):
        return torch.randperm(10, generator=generator(3, stream, epoch)).tolist()

    items = range(10)
    assert [i for step in range(5) for i in batch_at(items, step, 4, 3)] == order("epoch", 0) + order("epoch", 1)
    assert batch_at(items, 0, 10, 3, "ptx") == order("ptx", 0) != order("epoch", 0)


def test_a_response_that_is_no_text_matters_to_supervised_examples_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": ["b"]}\n')
    prompts = load_prompts(path)
    assert prompts[0].response is None
    with pytest.raises(UserError, match="has no `response`, which a supervised example needs"):
        tokenize_examples(prompts, make_tokenizer(), None, 99)
