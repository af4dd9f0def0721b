"""A method in a few words."""

from dataclasses import asdict

import pytest

from repo.config.method import describe_method
from repo.config.parse import make_parser, parse_config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "repo (rectified, group)"),
        ("--algorithm.method ppo_lagrangian --algorithm.advantages gae", "ppo_lagrangian (gae)"),
        ("--algorithm.method cdpo", "cdpo (pairs)"),
        (
            "--algorithm.cost_mode barrier --algorithm.barrier_tau 0.25 --algorithm.barrier_margin 0.5",
            "repo (barrier with τ = 0.25, m = 0.5, group)",
        ),
        (
            "--algorithm.credit redistributed --penalty.limit_schedule pi --gate.every 10",
            "repo (rectified, group, learned credit, limit by schedule pi, gate every 10 steps)",
        ),
    ],
)
def test_a_method_is_told_with_what_is_switched_on(argv, words):
    assert describe_method(asdict(parse_config(make_parser("", ""), argv.split()))) == words


def test_a_configuration_of_version_0_1_is_told():
    assert describe_method({"algorithm": {"method": "repo", "mode": "split"}}) == "repo (split)"
