"""Gate: the last accepted policy of a run, and the decision whether a later one takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..common.errors import UserError
from ..config.schema import GateConfig
from .decision import Decision, decide


class Gate:
    """Remembers the last accepted policy, by the steps that it had done and its share of safe responses per prompt.

    config: period and tolerance. steps: steps of the run. measure: returns the share of safe responses to each
    validation prompt, of the policy as it is when called; the same numbers on every process.
    """

    def __init__(self, config: GateConfig, steps: int, measure: Callable[[], Sequence[float]]) -> None:
        self.config, self.steps, self.measure = config, steps, measure
        self.accepted: int | None = None  # nothing is until the first policy is measured
        self.safe: list[float] = []
        self.rejections = 0

    @property
    def lr_scale(self) -> float:
        """Return the factor of the learning rate: it is halved with every policy that was not accepted."""
        return 0.5**self.rejections

    def due(self, done: int) -> bool:
        """Tell whether the policy is judged after `done` steps: every config.every steps, and after the last one."""
        return bool(self.config.every) and (done % self.config.every == 0 or done == self.steps)

    def begin(self, done: int) -> bool:
        """Accept the policy that a run begins with, unless one is accepted already; tell whether that happened.

        done: steps done. A checkpoint of this policy must follow, to which a later decision can lead back.
        """
        if not self.config.every or self.accepted is not None:
            return False
        self.accepted, self.safe = done, list(self.measure())
        return True

    def judge(self, done: int) -> Decision:
        """Measure the policy after `done` steps, and decide; if it is not accepted the caller goes back to `accepted`.

        Raises UserError if there are other validation prompts than when that one was accepted.
        """
        if self.accepted is None:
            raise RuntimeError("Gate.begin must come before Gate.judge: there is nothing to compare with")
        safe = list(self.measure())
        if len(safe) != len(self.safe):
            raise UserError(
                f"gate: there are {len(safe)} validation prompts now, and the policy of step {self.accepted} was "
                f"accepted by {len(self.safe)}; restore data.train, from which they are taken"
            )
        decision = decide(self.safe, safe, self.config.tolerance)
        if decision.accepted:
            self.accepted, self.safe = done, safe
        else:
            self.rejections += 1
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps; {} without a gate."""
        if self.accepted is None:
            return {}
        return {"accepted": self.accepted, "safe": self.safe, "rejections": self.rejections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, as state_dict returned it; {} and a run without a gate change nothing."""
        if state and self.config.every:
            self.accepted, self.safe = int(state["accepted"]), [float(x) for x in state["safe"]]
            self.rejections = int(state["rejections"])
