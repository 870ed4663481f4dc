"""become: the same object, another class; schedulers, state and references go on."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR, StepLR

from lq_plugin.optim import TWINS, AdamW8bit, Options, Swap, become, twin_of

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    "SequentialLR": lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), LinearLR(optimizer)], [3]),
}


def model() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(64, 80)


def train(layer: torch.nn.Linear, optimizer: Optimizer, scheduler: LRScheduler | None, steps: int) -> list[float]:
    rates = []
    for step in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 64, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def trained_by(theirs: type[Optimizer], layer: torch.nn.Module) -> list[Parameter]:
    """Muon takes matrices only."""
    return [param for param in layer.parameters() if param.ndim == 2 or theirs is not torch.optim.Muon]


@pytest.mark.parametrize("theirs", list(TWINS))
def test_the_object_stays_and_its_class_changes(theirs: type[Optimizer]) -> None:
    layer = model()
    optimizer = theirs(trained_by(theirs, layer), lr=1e-3)  # type: ignore[call-arg]
    groups = optimizer.param_groups
    swap = become(optimizer, Options(percentile_clipping=5))
    assert swap == Swap(theirs, TWINS[theirs], (), 0)
    assert swap.changed
    assert type(optimizer) is TWINS[theirs]
    assert optimizer.param_groups is groups
    assert groups[0]["percentile_clipping"] == 5
    train(layer, optimizer, None, 1)
    assert ("codes1" in optimizer.state[layer.weight]) == (theirs is not torch.optim.SGD)  # without momentum no state


@pytest.mark.parametrize("theirs", list(TWINS))
def test_a_swapped_optimizer_trains_like_one_that_was_built(theirs: type[Optimizer]) -> None:
    swapped_layer, built_layer = model(), model()
    swapped = theirs(trained_by(theirs, swapped_layer), lr=1e-2, weight_decay=0.1)  # type: ignore[call-arg]
    become(swapped, Options())
    built = TWINS[theirs](trained_by(theirs, built_layer), lr=1e-2, weight_decay=0.1)  # type: ignore[call-arg]
    train(swapped_layer, swapped, None, 5)
    train(built_layer, built, None, 5)
    assert torch.equal(swapped_layer.weight, built_layer.weight)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_drive_a_swapped_optimizer(name: str) -> None:
    layer = model()
    plain = torch.optim.AdamW(layer.parameters(), lr=0.1)
    expected = train(layer, plain, SCHEDULERS[name](plain), 8)
    assert len(set(expected)) > 1

    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    become(optimizer, Options())
    rates = train(layer, optimizer, scheduler, 4)
    saved, saved_scheduler = optimizer.state_dict(), scheduler.state_dict()
    assert rates + train(layer, optimizer, scheduler, 4) == expected

    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    become(optimizer, Options())
    optimizer.load_state_dict(saved)
    scheduler.load_state_dict(saved_scheduler)
    assert train(layer, optimizer, scheduler, 4) == expected[4:]


def test_state_of_torch_is_converted() -> None:
    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters())
    train(layer, optimizer, None, 3)
    moment, bias_moment = (optimizer.state[param]["exp_avg"].clone() for param in layer.parameters())
    swap = become(optimizer, Options())
    assert swap.converted == 2
    state = optimizer.state[layer.weight]
    assert set(state) == {"step", "codes1", "scale1", "codes2", "scale2"}
    assert torch.equal(state["scale1"][:, 0], moment.abs().amax(1))
    assert torch.equal(optimizer.state[layer.bias]["state1"], bias_moment)
    assert state["step"] == 3
    train(layer, optimizer, None, 1)


@pytest.mark.parametrize("argument", ["fused", "foreach"])
def test_fused_and_foreach_are_dropped_and_reported(argument: str) -> None:
    optimizer = torch.optim.AdamW(model().parameters(), **{argument: True})
    assert become(optimizer, Options()).dropped == (argument,)
    assert optimizer.param_groups[0][argument] is None
    assert optimizer.defaults[argument] is None
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})


@pytest.mark.parametrize("argument", ["amsgrad", "differentiable"])
def test_what_is_not_computed_raises_and_the_optimizer_stays(argument: str) -> None:
    optimizer = torch.optim.AdamW(model().parameters(), **{argument: True})
    with pytest.raises(ValueError, match=f"AdamW8bit got {argument}=True"):
        become(optimizer, Options())
    assert type(optimizer) is torch.optim.AdamW
    assert "format_version" not in optimizer.param_groups[0]


def test_only_exact_types_have_a_twin() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert twin_of(torch.optim.AdamW) is AdamW8bit
    assert twin_of(Mine) is None
    assert twin_of(torch.optim.NAdam) is None
    with pytest.raises(TypeError, match=r"Mine has no twin with few-bit state; there is one for torch.optim.AdamW, "):
        become(Mine(model().parameters()), Options())


def test_one_of_ours_keeps_its_options() -> None:
    optimizer = AdamW8bit(model().parameters(), percentile_clipping=9, state="32bit")
    assert not become(optimizer, Options()).changed
    assert optimizer.param_groups[0]["percentile_clipping"] == 9
    assert optimizer.param_groups[0]["state"] == "32bit"


def test_names_and_embeddings_are_known_by_id() -> None:
    tokens, wide = torch.nn.Embedding(80, 64), torch.nn.Linear(64, 80)
    optimizer = torch.optim.AdamW([tokens.weight, *wide.parameters()])
    names = {id(tokens.weight): "tokens.weight", id(wide.weight): "wide.weight", id(wide.bias): "wide.bias"}
    become(optimizer, Options(), names, embeddings={id(tokens.weight)})
    for param in (tokens.weight, *wide.parameters()):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert "state1" in optimizer.state[tokens.weight]
    assert "codes1" in optimizer.state[wide.weight]
    assert isinstance(optimizer, AdamW8bit)
    assert optimizer.parameter_name(wide.bias) == "wide.bias"
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))]})  # without names, as before


def test_a_second_swap_changes_nothing_but_names() -> None:
    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters())
    for name in ("first", "second"):
        become(optimizer, Options(), {id(layer.weight): name}, {id(layer.weight)})
        assert isinstance(optimizer, AdamW8bit)
        assert optimizer.parameter_name(layer.weight) == name
        assert len(optimizer._names) == len(optimizer._embeddings) == 1


def test_a_step_that_belongs_to_the_instance_is_not_lost_silently() -> None:
    optimizer = torch.optim.AdamW(model().parameters())
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="has a step of its own"):
        become(optimizer, Options())


def test_a_swapped_optimizer_with_a_scheduler_is_freed_at_once() -> None:
    optimizer: Any = torch.optim.AdamW(model().parameters())
    scheduler: Any = StepLR(optimizer, 1)
    become(optimizer, Options())
    reference = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, scheduler
        assert reference() is None
    finally:
        gc.enable()
