"""The tiny tokenizer."""

import pytest

from tests.support.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
