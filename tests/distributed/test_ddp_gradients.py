"""Averaged gradients of several ranks are those of one rank with all tokens.

Up to the order of sums where no scale spans tokens, and elsewhere within the error of quantising twice. A loss that is
linear in the output makes grad_output known, the same on both sides but for a power of two.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lq_plugin import LoRAConfig, convert
from lq_plugin.formats import FROZEN_FORMATS, TRAINABLE_FORMATS

pytestmark = pytest.mark.integration

TOKENS, IN, OUT, RANK = 64, 48, 40, 4
EPS = 2.0**-24
# Where a scale of grad_weight's operands spans tokens: how grad_output and input are rounded.
SPANNING = {
    "int8_rowwise": ("int8", "int8"),
    "fp8_tensorwise": ("e5m2", "e4m3"),
    "fp8_rowwise": ("e4m3", "e4m3"),
    "sim_fp8_global": ("e5m2", "e4m3"),
}
# Half a step beside a value, and beside zero for a largest value of 1: the mantissas have 3 and 2 bits, int8 none; the
# smallest steps of fp8 are 2^-9 of 448 and 2^-16 of 57344, in bitsandbytes' maps a little larger.
ROUNDING = {"int8": (0.0, 0.5 / 127), "e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17)}
# A scale is a rounded quotient, and so is every value over it.
SLACK = 1 + 2.0**-10


def layer() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(IN, OUT))


def data() -> tuple[Tensor, Tensor]:
    """Inputs with heavy tails but no outlier of LLM.int8(), and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, IN, generator=generator)
    return (x * x.abs()).clamp(-5, 5), torch.randn(TOKENS, OUT, generator=generator)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    ((model(x) * y).sum() / len(x)).backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    found = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return {name.removeprefix("0."): grad.clone() for name, grad in found.items()}


def both(name: str) -> dict[str, Any]:
    frozen = name in FROZEN_FORMATS
    model = layer()
    convert(model, name, lora=LoRAConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False) if frozen else None)
    x, y = data()
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    one = gradients(model, x, y)
    many = gradients(DistributedDataParallel(model), x[mine], y[mine])
    adapters = {k.removeprefix("0."): p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    return {"one": one, "many": many, "parameters": adapters}


def on_rank(folder: Path) -> None:
    found = {name: both(name) for name in (*TRAINABLE_FORMATS, *FROZEN_FORMATS)}
    torch.save(found, folder / f"gradients.{dist.get_rank()}.pt")


def summed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a.t() @ b in float64, and a bound of what float32 makes of it twice, in whatever order."""
    terms = a.double().abs().t() @ b.double().abs()
    return a.double().t() @ b.double(), 2 * (len(a) + 4) * EPS * terms


@pytest.mark.parametrize("name", [name for name in TRAINABLE_FORMATS if name not in SPANNING])
def test_several_ranks_are_one_up_to_the_order_of_sums(name: str, of_ranks: Callable[[str], list[Any]]) -> None:
    x, y = data()
    for of_rank in of_ranks("gradients"):
        one, many = of_rank[name]["one"], of_rank[name]["many"]
        exact, bound = summed(y / TOKENS, x)
        # What keeps codes takes the input back from int8: half a step of a row's largest value.
        read_back = x.abs().amax(1, keepdim=True) * (0.5 / 127 if "mem_efficient" in name else 0)
        off = (y.double().abs() / TOKENS).t() @ read_back.double().expand_as(x)
        assert ((one["weight"] - exact).abs() <= (bound + off) * SLACK).all()
        assert ((many["weight"] - one["weight"]).abs() <= (bound + EPS * off * TOKENS) * SLACK).all()
        torch.testing.assert_close(many["bias"], one["bias"], rtol=0, atol=float(2 * EPS * (y.abs().sum(0)).max()))


@pytest.mark.parametrize("name", SPANNING)
def test_several_ranks_are_one_within_the_error_of_quantising(name: str, of_ranks: Callable[[str], list[Any]]) -> None:
    x, y = data()
    grad = y.double() / TOKENS
    errors = [
        relative * v.abs() + floor * v.abs().max()
        for (relative, floor), v in zip((ROUNDING[kind] for kind in SPANNING[name]), (grad, x.double()), strict=True)
    ]
    off = errors[0].t() @ x.double().abs() + grad.abs().t() @ errors[1] + errors[0].t() @ errors[1]
    exact, reordered = summed(grad, x)
    for of_rank in of_ranks("gradients"):
        one, many = of_rank[name]["one"]["weight"], of_rank[name]["many"]["weight"]
        for quantized in (one, many):
            assert ((quantized - exact).abs() <= (off + reordered) * SLACK).all()
        assert not torch.equal(one, many)  # scales of half of the tokens are others


@pytest.mark.parametrize("name", FROZEN_FORMATS)
def test_adapters_beside_frozen_layers_get_the_gradients_of_one_rank(
    name: str, of_ranks: Callable[[str], list[Any]]
) -> None:
    x, y = data()
    for of_rank in of_ranks("gradients"):
        one, many, parameters = (of_rank[name][part] for part in ("one", "many", "parameters"))
        down, up = (next(p for key, p in parameters.items() if part in key) for part in ("lora_A", "lora_B"))
        terms = {"lora_A": (y.abs() @ up.abs()).t() @ x.abs(), "lora_B": y.abs().t() @ (x.abs() @ down.abs().t())}
        assert len(one) == 2
        for key, grad in one.items():
            bound = 2 * (TOKENS + IN + OUT + RANK) * EPS * next(t for part, t in terms.items() if part in key) / TOKENS
            assert grad.count_nonzero() == grad.numel()
            assert ((many[key] - grad).abs() <= bound).all()


@pytest.mark.parametrize("name", [*TRAINABLE_FORMATS, *FROZEN_FORMATS])
def test_averaged_gradients_are_the_same_bits_on_all_ranks(name: str, of_ranks: Callable[[str], list[Any]]) -> None:
    first, *others = (of_rank[name]["many"] for of_rank in of_ranks("gradients"))
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)
