"""The methods that the comparison trains, as options of repo.train that differ from the default configuration."""

from __future__ import annotations

from dataclasses import dataclass

from repo.config.parse import PRESETS


@dataclass(frozen=True)
class Method:
    """A method.

    title: in tables and figures. options: that differ from the default. colour, marker: in figures.
    """

    title: str
    options: tuple[str, ...]
    colour: str
    marker: str


PAIRS = "--rollout.prompts_per_step=8"
"""For methods that learn from pairs: as many responses in a step as the default's four prompts with four samples."""

METHODS = {
    "ppo": Method("PPO", ("--algorithm.method=ppo",), "#c2410c", "v"),
    "fixed_penalty": Method("fixed penalty", ("--algorithm.method=fixed_penalty",), "#8a3ffc", "P"),
    "ppo_lagrangian": Method("PPO-Lagrangian", ("--algorithm.method=ppo_lagrangian",), "#b28600", "s"),
    "repo": Method("RePO", ("--algorithm.method=repo",), "#0062a3", "D"),
    "paper": Method("RePO, preset paper", (f"--config={PRESETS / 'paper.yaml'}",), "#00795a", "^"),
    "cdpo": Method("constrained DPO", ("--algorithm.method=cdpo", PAIRS), "#7a5195", "<"),
    "repo_dpo": Method("rectified DPO", ("--algorithm.method=repo_dpo", PAIRS), "#00829b", ">"),
    "barrier": Method("barrier", ("--algorithm.cost_mode=barrier", "--algorithm.barrier_tau=0.25"), "#5f6b00", "p"),
    "redistributed": Method("RePO, learned credit", ("--algorithm.credit=redistributed",), "#003a70", "*"),
    "matched": Method("PPO-Lagrangian, limit at RePO's E[C]", ("--algorithm.method=ppo_lagrangian",), "#d6409f", "X"),
}
"""By name. matched also gets a cost limit: the mean cost that RePO reaches in training."""
COMPARED = ("ppo", "fixed_penalty", "ppo_lagrangian", "repo", "paper")
"""Methods that are trained if no others are named."""
NEIGHBOURS = ("ppo_lagrangian", "repo", "cdpo", "repo_dpo", "barrier", "redistributed")
"""Methods that --neighbours compares: other answers to the same question, in the same loop."""
OURS, BASELINE = "repo", "ppo_lagrangian"
"""Methods from which differences are taken: of the neighbours, and of COMPARED."""


def title_of(name: str) -> str:
    """Return the title of a method, or the name itself where there is none."""
    return METHODS[name].title if name in METHODS else name
