"""Forwards that are replaced for a while, one within another."""

import pytest
import torch
from torch import nn

from repo_kernels.layers.forwards import replaced_forwards


def fail_inside(layer, x):
    with replaced_forwards({layer: lambda x: x + 2}):
        assert torch.equal(layer(x), x + 2)
        raise KeyError("inside")


def test_the_forward_before_comes_back_also_a_replaced_one_and_after_an_error():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    own = layer(x)
    with replaced_forwards({layer: lambda x: x + 1}):
        with pytest.raises(KeyError, match="inside"):
            fail_inside(layer, x)
        assert torch.equal(layer(x), x + 1)
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x), own)
