"""Whatever a user types or has in a file, the command trains or ends with a sentence, and leaves nothing half done."""

import dataclasses
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from repo import train
from repo.common.errors import UserError
from repo.config.parse import load_config
from repo.config.schema import Config

JUNK = [
    "",
    "x",
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    ".nan",
    ".inf",
    "1e400",
    "null",
    "[]",
    "{}",
    "[1, 2]",
    "{a: 1}",
    "true",
    "é\u2028",
]
SAFE = {  # fields whose values bound time and memory, or name things outside
    "out": [],
    "steps": ["1", "0", "-3", "one"],
    "seed": ["0", "7", "-1", "1e3", str(2**70)],
    "loggers": ["[]", "[tensorboard]", "[tensorboad]", "tensorboard", "null"],
    "model.path": ["/nowhere", "", "README.md", "/dev/null", "."],
    "model.device": ["cpu", "auto", "cuda", "cuda:99", "tpu", ""],
    "model.compile": ["false", "maybe"],
    "model.shard": ["1", "0", "2", "-1"],
    "model.lora_rank": ["0", "2", "-2", "x"],
    "data.column": ["prompt", "question", "", "id"],
    "rollout.prompts_per_step": ["1", "2", "3", "0", "x"],
    "rollout.samples_per_prompt": ["1", "2", "3", "0"],
    "rollout.max_response_tokens": ["1", "2", "8", "300", "0", str(10**12)],
    "scoring.reward": [
        "tests.support.scorers:words",
        "tests.support.scorers:not_a_number",
        "tests.support.scorers:nothing",
        "tests.support.scorers:raising",
        "{tests.support.scorers:words: 0.5, tests.support.scorers:reward: -1}",
        "{}",
        "nowhere",
        "os:getcwd",
    ],
    "scoring.cost": [
        "tests.support.scorers:cost",
        "tests.support.scorers:too_few",
        "a b:c",
        "x:",
        ":y",
        "builtins:len",
    ],
    "scoring.timeout": ["5", "0", "-1", "x"],
    "evaluation.judge": ["none", "nowhere:to_be_found"],
    "evaluation.prompts": ["0", "1", "2", "-1"],
    "ptx.data": ["null", "nowhere.jsonl", "README.md"],
}


def leaves(kind: type = Config, prefix: str = "") -> dict[str, typing.Any]:
    """Type of every field by its dotted name."""
    found = {}
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        name = f"{prefix}{field.name}"
        found |= leaves(hint, f"{name}.") if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def values(name: str, hint: typing.Any) -> list[str]:
    """What is tried for a field: its choices or numbers in and out of range, and junk."""
    if name in SAFE:
        return SAFE[name]
    choices = [str(x) for x in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []
    return choices * 4 + ["1", "2", "3", "0.01", "0.3", "false", "true", "[0.1, 0.2]", "[0.9, 0.99]"] * 2 + JUNK


FIELDS = {name: values(name, hint) for name, hint in leaves().items() if values(name, hint)}
PROMPTS = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.sampled_from(
            [
                b'{"prompt": "What is bread?"}',
                b'{"prompt": "Hm?", "id": 1}',
                b'{"prompt": ""}',
                b'{"prompt": 3}',
                b'{"prompt": [{"role": "user", "content": "Hi"}]}',
                b'{"messages": [{"role": "robot", "content": "Hi"}]}',
                b"[]",
                b"null",
                b"{",
                b"",
                b'{"prompt": "\\ud800"}',
                '{"prompt": "ünïcode \u2028 \U0001f600"}'.encode(),
                b"\xff\xfe",
            ]
        ),
        max_size=5,
    ).map(b"\n".join),
)
OVERRIDES = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(FIELDS[name]))),
    max_size=4,
    unique_by=lambda pair: pair[0],
)


def check(overrides, prompts: bytes | None, as_file: bool, arguments: list[str], folder: Path) -> str:
    """Run the command; returns how it ended."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out, options = folder / "run", [f"--{name}={value}" for name, value in overrides]
    if as_file:
        nested: dict = {}
        for name, value in overrides:
            *path, last = name.split(".")
            here = nested
            for part in path:
                here = here.setdefault(part, {})
            here[last] = value
        (folder / "given.yaml").write_text(yaml.safe_dump(nested))
        options = [f"--config={folder / 'given.yaml'}"]
    if prompts is not None:
        (folder / "prompts.jsonl").write_bytes(prompts)
        options.append(f"--data.train={folder / 'prompts.jsonl'}")
    before = set(folder.rglob("*"))
    try:
        train.run_command([*arguments, *options, f"--out={out}"])
    except UserError as error:
        sentence, ended = str(error), "refused"
    else:
        sentence, ended = "done", "trained"
        assert (out / "final" / "model.safetensors").is_file() or (
            out / "final" / "adapter_model.safetensors"
        ).is_file()
    assert sentence.strip()
    assert "\n" not in sentence
    assert len(sentence) < 2000
    left = set(folder.rglob("*")) - before
    assert not [p for p in left if p.name.startswith(".")]  # nothing half written
    if out.exists():
        load_config(out / "config.yaml")
        assert (out / "metrics.jsonl").is_file()
    return ended


@pytest.fixture(scope="module")
def arguments(tiny_arguments) -> list[str]:
    return [*tiny_arguments, "--steps=1", "--evaluation.prompts=1", "--sample_every=0"]


ENDS: dict[str, int] = {}


def property_test(examples: int):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # each example is a run: shrinking would take longer than the search
    )
    @given(overrides=OVERRIDES, prompts=st.one_of(st.none(), st.none(), st.none(), PROMPTS), as_file=st.booleans())
    def run(arguments, folder, overrides, prompts, as_file):
        ended = check(overrides, prompts, as_file, arguments, folder)
        ENDS[ended] = ENDS.get(ended, 0) + 1

    return run


@pytest.mark.parametrize("examples", [40, pytest.param(600, marks=pytest.mark.long)])
def test_a_users_mistake_is_a_sentence_and_leaves_nothing_half_done(examples, arguments, tmp_path, capsys):
    ENDS.clear()
    property_test(examples)(arguments, tmp_path / "here")
    assert sum(ENDS.values()) >= examples
    assert ENDS["trained"] > examples // 20
    assert ENDS["refused"] > examples // 10
