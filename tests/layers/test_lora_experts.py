"""LoRA beside fused experts, token by token against the formula in float64."""

import pytest
import torch
from torch import Tensor, nn

from lq_plugin.formats import FORMATS
from lq_plugin.layers.experts import FrozenExpertWeight, Routing
from lq_plugin.layers.lora_experts import LoRAExperts

EXPERTS, IN, OUT = 5, 32, 48


def base(format: str = "nf4", in_features: int = IN, out_features: int = OUT) -> FrozenExpertWeight:
    layer = FrozenExpertWeight(EXPERTS, in_features, out_features, FORMATS[format])
    layer.requantize(torch.randn(EXPERTS, out_features, in_features) * 0.2)
    return layer


def routing(experts: list[int]) -> Routing:
    expert = torch.tensor(experts, dtype=torch.int64)
    ends = torch.searchsorted(expert, torch.arange(EXPERTS), right=True)
    return Routing(expert, ends.to(torch.int32))


SOME = [0, 0, 0, 2, 2, 3, 3, 3, 3, 3, 4]  # none for expert 1


def expected(layer: LoRAExperts, x: Tensor, experts: list[int]) -> Tensor:
    weight = layer.base_layer.dequantize().double()
    weight = weight + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    rows = [weight[e] @ row for row, e in zip(x.double(), experts, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, layer.out_features).double()


@pytest.mark.parametrize("experts", [SOME, [1], [], [4] * 37], ids=len)
@pytest.mark.parametrize(("rank", "sizes"), [(4, (IN, OUT)), (3, (IN, OUT)), (3, (33, 50)), (40, (30, 10))])
def test_output_and_gradients_are_those_of_the_formula(rank: int, sizes: tuple[int, int], experts: list[int]) -> None:
    """Ranks and sizes that grouped products take, and others."""
    layer = LoRAExperts(base("nf4", *sizes), rank, 6, init_lora_weights=False)
    x = torch.randn(len(experts), sizes[0], requires_grad=True)
    output, reference = layer(x, routing(experts)), expected(layer, x, experts)
    wanted = [x, layer.lora_A, layer.lora_B]
    grad = torch.randn(output.shape)
    found = [output, *torch.autograd.grad(output, wanted, grad)]
    right = [reference, *(torch.autograd.grad(reference, wanted, grad.double()) if experts else [None] * 3)]
    for a, b in zip(found, right, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm()


def test_autocast_and_bfloat16() -> None:
    layer = LoRAExperts(base(), 8, 6, init_lora_weights=False)
    x = torch.randn(len(SOME), IN)
    reference = expected(layer, x, SOME)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x, routing(SOME))
    for y in (output, layer(x.bfloat16(), routing(SOME))):
        assert y.dtype is torch.bfloat16
        assert (y.double() - reference).norm() < 2e-2 * reference.norm()


@pytest.mark.parametrize("format", ["nf4", "nf4_dq", "llm_int8"])
def test_merging_and_back(format: str) -> None:
    layer = LoRAExperts(base(format), 4, 6, init_lora_weights=False).eval()
    x = torch.randn(len(SOME), IN)
    before, output = {k: v.clone() for k, v in layer.state_dict().items()}, layer(x, routing(SOME))
    wanted = layer.adapted_weight()
    layer.merge()
    fresh = base(format)
    fresh.requantize(wanted)
    torch.testing.assert_close(layer.base_layer.dequantize(), fresh.dequantize())
    layer.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer(x, routing(SOME)), output)


def test_how_it_begins() -> None:
    plain, x = base(), torch.randn(len(SOME), IN)
    layer = LoRAExperts(plain, 4)
    assert torch.equal(layer(x, routing(SOME)), plain(x, routing(SOME)))
    assert layer.lora_A.abs().max() <= IN**-0.5
    assert not any(torch.equal(layer.lora_A[0], layer.lora_A[e]) for e in range(1, EXPERTS))
    normal = LoRAExperts(plain, 4, init_lora_weights="gaussian").lora_A
    assert abs(normal.std().item() * 4 - 1) < 0.1  # 640 draws: 1 / sqrt(2 * 640) = 0.03
    with pytest.raises(TypeError, match="Linear"):
        LoRAExperts(nn.Linear(3, 3))
