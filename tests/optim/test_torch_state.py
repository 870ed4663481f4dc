"""State goes to torch's own optimizers and comes back."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lq_plugin import optim
from lq_plugin.optim import TWINS
from lq_plugin.optim.muon import Muon8bit
from lq_plugin.optim.torch_state import to_torch

SHAPES = [(16, 512), (33, 130), (7,), ()]
ARGUMENTS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW8bit, {"lr": 1e-2}),
    (optim.Adam8bit, {"weight_decay": 0.1}),
    (optim.SGD8bit, {"momentum": 0.9, "dampening": 0.1}),
    (optim.SGD8bit, {}),
    (optim.RMSprop8bit, {"centered": True, "momentum": 0.9}),
    (optim.RMSprop8bit, {"momentum": 0.9}),
    (optim.Adagrad8bit, {"lr_decay": 0.1}),
    (Muon8bit, {"lr": 1e-2}),
]


def parent_of(cls: Any) -> Any:
    return torch.optim.Muon if cls is Muon8bit else next(theirs for theirs, ours in TWINS.items() if ours is cls)


def parameters(cls: Any, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES if len(shape) == 2 or cls is not Muon8bit]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


@pytest.mark.parametrize(("cls", "arguments"), ARGUMENTS)
def test_torch_goes_on_from_our_state(cls: Any, arguments: dict[str, Any]) -> None:
    mine = parameters(cls)
    optimizer = cls(mine, **arguments, state="32bit")
    train(optimizer, mine, 3)
    theirs = [Parameter(param.detach().clone()) for param in mine]
    torch_optimizer = parent_of(cls)(theirs, **arguments)
    torch_optimizer.load_state_dict(to_torch(optimizer))
    assert torch_optimizer.param_groups[0].keys() == parent_of(cls)(theirs).param_groups[0].keys()
    for param, their in zip(mine, theirs, strict=True):
        param.grad = torch.randn_like(param)
        their.grad = param.grad.clone()
    optimizer.step()
    torch_optimizer.step()
    for param, their in zip(mine, theirs, strict=True):
        # Muon rounds directions of at most 1 to bfloat16, here and there from momenta that differ in their last bit.
        torch.testing.assert_close(param, their, rtol=1e-5, atol=1e-2 * 2**-7 if cls is Muon8bit else 1e-6)


@pytest.mark.parametrize("state", ["8bit", "32bit"])
@pytest.mark.parametrize(("cls", "arguments"), ARGUMENTS)
def test_a_round_trip_through_torch_changes_nothing(cls: Any, arguments: dict[str, Any], state: str) -> None:
    params = parameters(cls)
    optimizer = cls(params, **arguments, state=state)
    train(optimizer, params, 3)
    torch_optimizer = parent_of(cls)(params)
    torch_optimizer.load_state_dict(to_torch(optimizer))
    again = cls(params, state=state, **arguments)
    again.load_state_dict(torch_optimizer.state_dict())
    before, after = optimizer.state_dict(), again.state_dict()
    without_step = issubclass(parent_of(cls), (torch.optim.SGD, torch.optim.Muon))
    for n, state_before in before["state"].items():
        expected = {key: value for key, value in state_before.items() if not (without_step and key == "step")}
        found = {key: value for key, value in after["state"].get(n, {}).items() if key in expected}
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert before["param_groups"][0].items() <= after["param_groups"][0].items()


def test_what_is_written_shares_no_memory_and_parameters_without_state_have_none() -> None:
    params = parameters(optim.AdamW8bit)
    optimizer = optim.AdamW8bit([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    written = to_torch(optimizer)
    assert list(written["state"]) == [2]
    assert [group["params"] for group in written["param_groups"]] == [[0, 1], [2, 3]]
    assert [group["lr"] for group in written["param_groups"]] == [1e-3, 0.5]
    before = copy.deepcopy(written["state"])
    optimizer.step()
    torch.testing.assert_close(written["state"], before, rtol=0, atol=0)


def test_state_of_half_precision_parameters_is_float32() -> None:
    params = parameters(optim.AdamW8bit, torch.bfloat16)
    optimizer = optim.AdamW8bit(params, percentile_clipping=5, master_weights="8bit")
    train(optimizer, params, 2)
    written = to_torch(optimizer)
    assert written["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert {value.dtype for value in written["state"][0].values()} == {torch.float32}
    torch_optimizer = torch.optim.AdamW(params)
    torch_optimizer.load_state_dict(written)
    train(torch_optimizer, params, 1)


@pytest.mark.parametrize("cls", [optim.LARS8bit, optim.LAMB8bit, optim.Lion8bit, optim.AdEMAMix8bit])
def test_an_algorithm_that_torch_does_not_have_is_refused_by_name(cls: Any) -> None:
    with pytest.raises(TypeError, match=f"torch has no {cls.__name__}"):
        to_torch(cls([Parameter(torch.ones(2, 2))]))
