"""scoring.clamp cuts scores, and says so once."""

from tests.support.score_models import FUNCTIONS, PROMPTS, RESPONSES, scoring


def test_a_warning_tells_once_that_scores_are_cut(capsys):
    both = scoring(reward={f"{FUNCTIONS}:words": 20.0}, clamp=50.0)
    assert both(PROMPTS, RESPONSES).rewards.tolist() == [50, 0, 50, 50]
    both(PROMPTS, RESPONSES)
    told = capsys.readouterr().err
    assert told == (
        "warning: scoring.reward gave scores from 80 to 80, which scoring.clamp=50 cuts to 50 in size; "
        "raise it if they are meant\n"
    )
