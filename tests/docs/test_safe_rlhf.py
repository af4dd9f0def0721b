"""The page for users of safe-rlhf: its run is a run here, and its flags lead to the fields that the hints name."""

import re

from repo.config.fields import field_names
from repo.config.hints import ELSEWHERE
from repo.config.parse import make_parser, parse_config

from .pages import blocks, read

PAGE = "docs/integrations/safe-rlhf.md"


def rows():
    """Yield (flags, second and third cell) of the table of flags."""
    table = read(PAGE).split("| flag of `ppo_lag` |", 1)[1].split("\n\n", 1)[0]
    for line in table.splitlines()[2:]:
        flags, fields, note = re.fullmatch(r"\| (.*?) \| ?(.*?) \| ?(.*?) ?\|", line).groups()
        yield re.findall(r"`(\w+)`", flags), fields + note


def test_the_run_of_the_page_is_one(tmp_path):
    (tmp_path / "run.yaml").write_text(blocks(read(PAGE), "yaml")[0])
    config = parse_config(make_parser("repo", ""), ["--config", str(tmp_path / "run.yaml")])
    assert config.algorithm.method == "ppo_lagrangian"
    assert config.algorithm.beta == 0.01
    assert (config.penalty.initial, config.penalty.lr, config.penalty.max) == (1.0, 0.1, 5.0)


def test_repo_is_an_option_of_that_run(tmp_path):
    (tmp_path / "run.yaml").write_text(blocks(read(PAGE), "yaml")[0])
    options = ["--config", str(tmp_path / "run.yaml"), "--algorithm.method", "repo"]
    assert parse_config(make_parser("repo", ""), options).algorithm.method == "repo"


def test_each_flag_leads_to_the_field_that_an_unknown_option_is_told():
    found = {flag: text for flags, text in rows() for flag in flags}
    known = {flag: ELSEWHERE[flag] for flag in found if flag in ELSEWHERE}
    assert len(known) > 20
    assert {flag: field for flag, field in known.items() if f"`{field}`" not in found[flag]} == {}


def test_each_field_of_the_table_exists():
    named = {field for _, text in rows() for field in re.findall(r"`([a-z]+(?:\.[a-z_]+)?)`", text)}
    named -= {"scorers", "offset", "scale"}
    assert {field for field in named if "." in field or field in ("seed", "out", "steps")} <= set(field_names())
    assert len(named) > 25


def test_what_is_said_to_be_constant_is():
    from repo.models.critic import VALUE_CLIP
    from repo.training.multipliers import WINDOW

    found = {flag: text for flags, text in rows() for flag in flags}
    assert f"always {VALUE_CLIP}" in found["clip_range_value"]
    assert f"always {WINDOW}" in found["episode_cost_window_size"]
