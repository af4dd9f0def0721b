"""Chat templates as they are published: with dates, thinking blocks, parts of several media, and turns left out."""

import json
from datetime import datetime, timedelta

import pytest
from tokenizers.processors import TemplateProcessing

from repo import train
from repo.common.errors import UserError
from repo.data.chat_format import ChatFormat
from repo.data.prompts import Prompt, encode_prompt, load_prompts, tokenize_examples, tokenize_prompts
from repo.evaluate import run_command as evaluate
from tests.support.prompts import load, without_template
from tests.support.tiny import make_tokenizer

TURN = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
DATED = "<|user|>{{ strftime_now('%d %b %Y') }}<|end|>" + TURN + ASSISTANT
# Deepseek-R1's distilled models: the prompt opens a thinking block, of which nothing is left in a turn with an answer
OPENED = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Qwen3: an answer without thoughts gets an empty thinking block
EMPTY = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|end|>{% endfor %}" + ASSISTANT
)
LAST_SYSTEM = (  # Mistral: the system prompt stands in the last turn, if that is the user's
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'user' and loop.last and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }} {% endif %}"
    "{{ m['content'] }}<|end|>{% endif %}{% endfor %}" + ASSISTANT
)


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def example(template, record, tmp_path, **chat):
    """Return the texts of a supervised example's prompt and response."""
    tokenizer = with_template(template)
    (found,) = tokenize_examples(load(tmp_path, record), tokenizer, None, 999, (), ChatFormat(tokenizer, **chat)).kept
    return tokenizer.decode(found.prompt_ids), tokenizer.decode(found.response_ids)


def test_a_template_that_prints_the_date_gets_the_one_it_is_given(tmp_path):
    tokenizer = with_template(DATED)
    chat = ChatFormat(tokenizer, date="2024-07-26")
    prompt = Prompt("a", "bread", "")
    assert tokenizer.decode(encode_prompt(tokenizer, prompt, None, chat)).startswith("<|user|>26 Jul 2024<|end|>")
    assert f"{datetime.now():%b %Y}" in tokenizer.decode(encode_prompt(tokenizer, prompt))


def test_a_run_keeps_its_date(tiny_arguments, tiny_model, tmp_path, monkeypatch):
    folder, out = tmp_path / "dated", tmp_path / "run"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_template(DATED).save_pretrained(folder)
    more = [*tiny_arguments, f"--model.path={folder}", "--evaluation.prompts=2", "--rollout.max_response_tokens=4"]
    train.run_command([*more, "--steps=1", f"--out={out}"])
    tomorrow = datetime.now() + timedelta(days=1)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return tomorrow

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock, raising=True)
    turns = [{"role": "user", "content": "bread"}]
    assert f"{tomorrow:%d %b %Y}" in with_template(DATED).apply_chat_template(turns, tokenize=False)
    train.run_command(["--resume", str(out), "--steps=2"])
    evaluate([str(out), "--evaluation.samples_per_prompt=1"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_template_arguments_reach_the_template():
    tokenizer, prompt = with_template(EMPTY), Prompt("a", "bread", "")
    open_block, closed = (
        tokenizer.decode(encode_prompt(tokenizer, prompt, None, ChatFormat(tokenizer, arguments)))
        for arguments in ({}, {"enable_thinking": False})
    )
    assert open_block == "<|user|>bread<|end|><|assistant|><think>\n"
    assert closed == "<|user|>bread<|end|><|assistant|><think>\n\n</think>\n\n"


@pytest.mark.parametrize(("name", "why"), [("enable_thinkng", "not in the"), ("messages", "filled by repo")])
def test_a_template_argument_that_the_template_does_not_use_is_an_error(name, why):
    with pytest.raises(UserError, match=f"data.template_arguments: the variable '{name}' is {why}"):
        ChatFormat(with_template(EMPTY), {name: False})
    with pytest.raises(UserError, match="data.template_arguments"):
        ChatFormat(without_template(), {name: False})


def test_template_arguments_come_from_the_command_line_and_do_not_change_on_resume(
    tiny_arguments, tiny_model, tmp_path
):
    folder, out = tmp_path / "thinking", tmp_path / "run"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_template(EMPTY).save_pretrained(folder)
    more = [*tiny_arguments, f"--model.path={folder}", "--evaluation.prompts=0", "--rollout.max_response_tokens=4"]
    train.run_command([*more, "--data.template_arguments={enable_thinking: false}", "--steps=1", f"--out={out}"])
    with pytest.raises(UserError, match="data.template_arguments was {'enable_thinking': False} in this run"):
        train.run_command(["--resume", str(out), "--steps=2", "--data.template_arguments.enable_thinking=true"])
    train.run_command(["--resume", str(out), "--steps=2"])


SYSTEM = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "bread"}], "id": "x"}
LATER = {
    "messages": [
        {"role": "user", "content": "bread"},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "water"},
    ]
}


@pytest.mark.parametrize(
    ("template", "record", "turn"),
    [
        (
            TURN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"),
            SYSTEM,
            "1, system",
        ),
        (TURN.replace("messages %}", "messages if loop.first or m['role'] != 'system' %}", 1), LATER, "2, system"),
        ("{{ messages[-1]['content'] }}", LATER, "1, user: 'bread'"),
        ("<|user|>{{ messages | length }}", {"prompt": "bread"}, "1, user: 'bread'"),
    ],
)
def test_a_template_that_leaves_out_a_turn_is_an_error_that_names_the_prompt(template, record, turn, tmp_path):
    template = template.replace("loop.first or ", "")
    prompts = load(tmp_path, {"prompt": "fine"} if "length" not in template else record, {"id": "at fault", **record})
    with pytest.raises(UserError, match=f"leaves out the text of a prompt's turn {turn}") as error:
        tokenize_prompts(prompts, with_template(template), None, 99)
    assert "prompts.jsonl:" in str(error.value)


def test_a_repeated_turn_that_is_left_out_once_is_noticed(tmp_path):
    turns = [{"role": "user", "content": "again"}, {"role": "user", "content": "again"}]
    with pytest.raises(UserError, match="turn 1, user: 'again'"):
        tokenize_prompts(load(tmp_path, {"messages": turns}), with_template("{{ messages[-1]['content'] }}"), None, 99)


def test_a_template_may_trim_text_and_drop_earlier_thoughts(tmp_path):
    turns = [
        {"role": "user", "content": "  bread\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFood."},
        {"role": "user", "content": "and\n\nwater "},
    ]
    template = OPENED.replace("m['content'] }}{% endif", "m['content'] | trim }}{% endif")
    (prompt,) = tokenize_prompts(load(tmp_path, {"messages": turns}), with_template(template), None, 99).kept
    assert make_tokenizer().decode(prompt.token_ids).endswith("<|assistant|><think>\n")


def test_a_template_of_several_media_gets_the_text_as_a_part(tmp_path):
    tokenizer = with_template(PARTS)
    (prompt,) = tokenize_prompts(load(tmp_path, {"prompt": "bread"}), tokenizer, "Be kind.", 99).kept
    assert tokenizer.decode(prompt.token_ids) == "<|system|>Be kind.<|end|><|user|>bread<|end|><|assistant|>"


RECORD = {"prompt": "bread", "response": "Food."}
THOUGHT = {"prompt": "bread", "response": "<think>\nhm\n</think>\n\nFood."}
START = "<|user|>bread<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "record", "chat", "prompt", "response"),
    [
        (OPENED, RECORD, {}, START, "Food.<|end|>"),
        (OPENED, THOUGHT, {}, f"{START}<think>\n", "hm\n</think>\n\nFood.<|end|>"),
        (EMPTY, RECORD, {"arguments": {"enable_thinking": False}}, f"{START}<think>\n\n</think>\n\n", "Food.<|end|>"),
        (EMPTY, RECORD, {}, None, None),
    ],
)
def test_an_answer_is_taught_where_the_template_puts_it(template, record, chat, prompt, response, tmp_path):
    found = example(template, record, tmp_path, **chat)
    whole = with_template(template).apply_chat_template(
        [{"role": "user", "content": "bread"}, {"role": "assistant", "content": record["response"]}], tokenize=False
    )
    if prompt is None:
        assert "".join(found) == whole
        assert found[0].startswith(f"{START}<think>")
    else:
        assert found == (prompt, response)


def test_an_answer_without_thoughts_after_an_opened_block_is_an_error(tmp_path):
    template = OPENED.replace("{{ m['content'].split('</think>')[-1] }}", "...")
    with pytest.raises(UserError, match="begins a response with <think>, and the response has no </think>; prompt 'x'"):
        example(template, {**RECORD, "id": "x"}, tmp_path)


def test_a_prompt_that_is_rendered_otherwise_before_an_answer_is_the_one_of_a_rollout(tmp_path):
    prompt, response = example(LAST_SYSTEM, {**SYSTEM, "response": "Food."}, tmp_path)
    assert prompt == "<|user|>Be kind. bread<|end|><|assistant|>"
    assert response == "Food.<|end|>"


def test_without_a_template_a_prompt_keeps_the_start_token_and_no_end_token():
    tokenizer = without_template()
    end, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", start), ("<|end|>", end)]
    )
    assert tokenizer("bread").input_ids[-1] == end
    ids = encode_prompt(tokenizer, Prompt("a", "bread", ""))
    assert ids == tokenizer("bread").input_ids[:-1]
    assert ids[0] == start


def test_a_date_that_is_none_is_refused():
    with pytest.raises(UserError, match="data.date must be a day as YYYY-MM-DD, or null; got '26 Jul'"):
        train.run_command(["--data.date=26 Jul"])


def test_columns_are_kept_with_the_prompt(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"prompt": "bread", "answer": [1, "a"]}) + "\n")
    (prompt,) = tokenize_prompts(load_prompts(file), make_tokenizer(), None, 99).kept
    assert prompt.columns == {"prompt": "bread", "answer": [1, "a"]}
