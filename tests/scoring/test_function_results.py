"""Results of scorer functions that are numbers, but not such as a score can be."""

import pytest
import torch

from repo.common.errors import UserError
from repo.scoring.function import FunctionScorer
from tests.support.score_models import PROMPTS, RESPONSES


def huge(prompts, responses):
    return [10**400] * len(prompts)


def sparse(prompts, responses):
    return torch.ones(len(prompts)).to_sparse()


def imaginary(prompts, responses):
    return torch.tensor([1j] * len(prompts))


def imaginary_array(prompts, responses):
    return imaginary(prompts, responses).numpy()


@pytest.mark.parametrize(
    ("name", "reason"), [("huge", "OverflowError"), ("imaginary", "complex"), ("imaginary_array", "complex")]
)
def test_a_result_that_is_no_score_is_refused_by_name(name, reason):
    with pytest.raises(UserError, match=rf"scoring.reward '.*:{name}' must return 4 numbers.*{reason}"):
        FunctionScorer(f"{__name__}:{name}", "reward", 10.0)(PROMPTS, RESPONSES)


def test_a_sparse_tensor_is_read():
    assert FunctionScorer(f"{__name__}:sparse", "reward", 10.0)(PROMPTS, RESPONSES).tolist() == [1.0] * 4
