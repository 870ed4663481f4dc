"""SwitchBack's layers by bitsandbytes' names, and their weights in int8 for inference."""

import pytest
import torch
from float64_formats import ARITHMETIC
from torch import Tensor, nn

from lq_plugin.formats import FORMATS
from lq_plugin.layers import (
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
)

CLASSES = {
    "int8_switchback": SwitchBackLinearGlobal,
    "int8_switchback_vectorwise": SwitchBackLinearVectorwise,
    "int8_switchback_mem_efficient": SwitchBackLinearGlobalMemEfficient,
}


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_has_its_format(name: str) -> None:
    layer = CLASSES[name](24, 40)
    assert isinstance(layer, SwitchBackLinear)
    assert layer.formats is FORMATS[name]
    assert f"format={name}" in repr(layer)


def test_the_options_choose_the_variant_and_both_together_are_refused() -> None:
    assert SwitchBackLinear(8, 8).formats.name == "int8_switchback"
    assert SwitchBackLinear(8, 8, vector_wise_quantization=True).formats.name == "int8_switchback_vectorwise"
    assert SwitchBackLinear(8, 8, mem_efficient=True).formats.name == "int8_switchback_mem_efficient"
    with pytest.raises(ValueError, match=r"vectorwise variant cannot be memory-efficient; take int8_switchback_vector"):
        SwitchBackLinear(8, 8, vector_wise_quantization=True, mem_efficient=True)


def test_state_dict_is_that_of_a_linear_layer() -> None:
    layer, plain = SwitchBackLinear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, layer.weight)


@pytest.mark.parametrize("name", CLASSES)
def test_prepared_for_eval_the_output_is_that_of_the_format_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    layer, x = CLASSES[name](83, 37), torch.randn(2, 5, 83)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    with torch.no_grad():
        before = layer(x)
        layer.eval().prepare_for_eval()
        layer.prepare_for_eval()
        after = layer(x)
    assert torch.equal(before, after)
    expected = ARITHMETIC[name](x.view(10, 83), weight, bias, torch.zeros(10, 37))[0]
    torch.testing.assert_close(after.view(10, 37).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_prepared_for_eval_only_int8_weights_are_left(name: str) -> None:
    layer = CLASSES[name](64, 32)
    amax = layer.weight.detach().abs().amax(1 if name.endswith("vectorwise") else None).view(-1)
    layer.prepare_for_eval()
    state = layer.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "bias": torch.float32,
        "W_int8": torch.int8,
        "state_W": torch.float32,
    }
    assert torch.equal(state["state_W"], amax)
    assert sum(value.nbytes for value in state.values()) == 64 * 32 + 4 * len(amax) + 4 * 32
    other = CLASSES[name](64, 32)
    other.prepare_for_eval()
    other.load_state_dict(state)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), layer.eval()(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        CLASSES[name](64, 32).load_state_dict(state)


def cast(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_scale_exact(dtype: torch.dtype) -> None:
    layer = SwitchBackLinearVectorwise(24, 40)
    layer.prepare_for_eval()
    scale: Tensor = layer.state_W.clone()
    cast(layer, dtype)
    assert torch.equal(layer.state_W, scale)
    assert layer.bias.dtype == dtype
    with torch.no_grad():
        assert layer.eval()(torch.randn(3, 24, dtype=dtype)).dtype == dtype


def test_training_with_int8_weights_only_is_an_error() -> None:
    layer = SwitchBackLinear(8, 8)
    layer.prepare_for_eval()
    with pytest.raises(RuntimeError, match=r"only int8 weights since prepare_for_eval\(\), and they have no gradient"):
        layer(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="only int8 weights"):
        layer.eval()(torch.randn(2, 8, requires_grad=True))


def test_inside_autocast_int8_weights_give_the_autocast_dtype() -> None:
    layer = SwitchBackLinear(8, 8)
    layer.prepare_for_eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer.eval()(torch.randn(2, 8)).dtype == torch.bfloat16
