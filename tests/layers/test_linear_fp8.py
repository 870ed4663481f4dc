"""bitsandbytes' layers with simulated fp8, to bitsandbytes' own bounds, and what they do otherwise."""

import pytest
import torch
from torch import nn

from lq_plugin.formats import FORMATS
from lq_plugin.layers import LinearFP8Global, LinearFP8Mixed
from lq_plugin.layers.linear import QuantLinear

CLASSES = {"sim_fp8_mixed": LinearFP8Mixed, "sim_fp8_global": LinearFP8Global}


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_its_format(name: str) -> None:
    layer = CLASSES[name](24, 40, bias=False, dtype=torch.bfloat16)
    assert layer.formats is FORMATS[name]
    assert layer.bias is None
    assert layer(torch.randn(2, 3, 24, dtype=torch.bfloat16)).shape == (2, 3, 40)


def test_mixed_is_within_the_bounds_of_bitsandbytes_own_test() -> None:
    """Batch 10, 1024 features; source: bitsandbytes 0.49, tests/test_modules.py, test_fp8linear."""
    torch.manual_seed(0)
    layer, plain = LinearFP8Mixed(1024, 2048), nn.Linear(1024, 2048)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(10, 1024)
    output, expected = layer(x), plain(x)
    output.mean().backward()
    expected.mean().backward()
    assert (output - expected).abs().mean() < 0.05
    assert (layer.weight.grad - plain.weight.grad).abs().mean() < 2e-5
    assert (layer.bias.grad - plain.bias.grad).abs().mean() < 2e-5


def test_a_token_does_not_change_the_blocks_of_its_neighbours() -> None:
    """With 96 features flat blocks of 128 would cross rows."""
    layer, x = LinearFP8Mixed(96, 24), torch.randn(6, 96)
    louder = x.clone()
    louder[3] *= 1e4
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(layer(louder)[kept], layer(x)[kept])
    assert not torch.equal(LinearFP8Global(96, 24)(louder)[kept], LinearFP8Global(96, 24)(x)[kept])


@pytest.mark.parametrize("name", CLASSES)
def test_a_gradient_of_the_gradient_is_refused(name: str) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name} has no gradient of its gradient"):
        torch.autograd.grad(CLASSES[name](8, 8)(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_is_rounded_to_the_same_codes(name: str) -> None:
    """The codes of bfloat16 values are those of the same values in float32; their product is rounded to bfloat16."""
    torch.manual_seed(0)
    layer = CLASSES[name](64, 32).bfloat16()
    exact = QuantLinear(64, 32)
    exact.formats = layer.formats
    exact.load_state_dict({key: value.float() for key, value in layer.state_dict().items()})
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    # Three roundings to bfloat16: of the two operands and of the result.
    torch.testing.assert_close(layer(x).float(), exact(x.float()), rtol=2.0**-7, atol=2.0**-7)
