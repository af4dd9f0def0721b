"""What an evaluation records of each response."""

import pytest
import torch

from repo.data.prompts import Prompt
from repo.evaluation.responses import columns_of, records_of
from repo.scoring.judge import Verdicts
from repo.scoring.scorers import Scores

PROMPTS = [Prompt("a", "How?", "harmful"), Prompt("b", "Why?", "benign")]
TEXTS = ["I'm sorry, but I can't help with that.", "Because it is so."]
SCORES = Scores(torch.tensor([0.5, -1.0]), torch.tensor([-0.25, 2.0]))


@pytest.mark.parametrize("topical", [False, True])
def test_each_response_has_its_scores_and_verdicts(topical):
    more = (torch.tensor([0.125, 0.75]), torch.tensor([False, True])) if topical else (None, None)
    asked = []

    def judge(prompts, texts):
        asked.append((list(prompts), list(texts)))
        return Verdicts(torch.tensor([True, False]), *more)

    records = records_of(PROMPTS, TEXTS, {"draws": [1, 3], **columns_of(PROMPTS, TEXTS, SCORES, judge)})
    assert asked == [(PROMPTS, TEXTS)]
    assert [(r["id"], r["category"], r["prompt"], r["response"]) for r in records] == [
        ("a", "harmful", "How?", TEXTS[0]),
        ("b", "benign", "Why?", TEXTS[1]),
    ]
    keys = ("draws", "reward", "cost", "refusal", "judge_safe")
    assert [[r[key] for key in keys] for r in records] == [[1, 0.5, -0.25, True, True], [3, -1.0, 2.0, False, False]]
    shown = [(r.get("topicality"), r.get("topical")) for r in records]
    assert shown == ([(0.125, False), (0.75, True)] if topical else [(None, None)] * 2)


def test_without_a_judge_there_is_no_verdict():
    assert set(columns_of(PROMPTS, TEXTS, SCORES, None)) == {"reward", "cost", "refusal", "repetition"}
