"""The front page is short, its example is right, and its commands are there."""

import re

import torch

from .pages import ROOT, blocks, read, run_blocks

README = read("README.md")


def test_it_is_a_front_page():
    lines = README.splitlines()
    assert len(lines) <= 150
    prose = [line for line in lines if not line.startswith(("|", "!"))]
    assert max(map(len, prose)) <= 120


def test_the_loss_example_runs_and_has_a_gradient():
    torch.manual_seed(0)
    names = run_blocks(README)
    assert names["logits"].grad.abs().sum() > 0
    assert names["out"].stats.unsafe_fraction == 0.5


def test_the_baseline_of_the_example_centres_the_cost():
    names = run_blocks(README)
    hinge = names["costs"].clamp_min(0)
    assert (hinge - hinge.flip(0)).sum() == 0


def test_the_commands_that_everybody_needs_are_on_it():
    commands = "\n".join(blocks(README, "bash"))
    assert set(re.findall(r"^make (\w+)", commands, re.MULTILINE)) >= {"train", "test", "reproduce"}


def test_it_has_one_picture_and_links_to_every_page():
    assert len(re.findall(r"!\[", README)) == 1
    linked = set(re.findall(r"\]\((docs/[\w\-/]+\.md)", README))
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/README.md"}
    assert pages <= linked
