"""Every optimizer against float64, in every format and with every option."""

import copy
from dataclasses import replace
from typing import Any

import float64_optimizers as exact
import pytest
import torch
from lq_kernels.optimizer_state import load_moment
from torch import Tensor
from torch.nn import Parameter

from lq_plugin import optim
from lq_plugin.optim.base import LowBitOptimizer

SHAPES = [(64, 256), (33, 130), (5, 7, 11), (100,), (), (0, 3), (1, 1)]

ALGORITHMS: dict[str, tuple[Any, dict[str, Any], exact.Algorithm]] = {
    "adam": (optim.Adam, {"weight_decay": 0.1}, exact.Adam(weight_decay=0.1)),
    "adamw": (optim.AdamW, {}, exact.AdamW()),
    "stable adam": (optim.Adam, {"weight_decay": 0.1, "update_clip": "rms"}, exact.Adam(weight_decay=0.1, stable=True)),
    "stable adamw": (optim.AdamW, {"update_clip": "rms"}, exact.AdamW(stable=True)),
    "ademamix": (optim.AdEMAMix, {"t_alpha": 6, "t_beta3": 8}, exact.AdEMAMix(t_alpha=6, t_beta3=8)),
    "ademamix, constant": (optim.AdEMAMix, {}, exact.AdEMAMix()),
    "lion": (optim.Lion, {"weight_decay": 0.1}, exact.Lion(weight_decay=0.1)),
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, exact.SGD(lr=0.1, weight_decay=0.1)),
    "sgd, dampened": (optim.SGD, {"momentum": 0.9, "dampening": 0.5}, exact.SGD(momentum=0.9, dampening=0.5)),
    "sgd, nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True}, exact.SGD(momentum=0.9, nesterov=True)),
    "rmsprop": (optim.RMSprop, {"weight_decay": 1e-3}, exact.RMSprop(weight_decay=1e-3)),
    "rmsprop, both": (optim.RMSprop, {"momentum": 0.9, "centered": True}, exact.RMSprop(momentum=0.9, centered=True)),
    "adagrad": (
        optim.Adagrad,
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2},
        exact.Adagrad(lr_decay=0.1, initial_accumulator_value=0.2),
    ),
    "lamb": (optim.LAMB, {"weight_decay": 0.1}, exact.LAMB(weight_decay=0.1)),
    "lars": (optim.LARS, {"lr": 1.0, "weight_decay": 0.1}, exact.LARS(lr=1.0, weight_decay=0.1)),
}


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]


def set_gradients(params: list[Parameter]) -> list[Tensor | None]:
    for param in params:
        param.grad = (torch.randn(param.shape) * 0.01 * torch.exp(torch.randn(()))).to(param.dtype)
    return [param.grad for param in params]


@pytest.mark.parametrize("percentile", [None, 5])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_float32_state_follows_float64(name: str, percentile: int | None) -> None:
    cls, arguments, algorithm = ALGORITHMS[name]
    params = parameters()
    reference = exact.Float64Optimizer(params, algorithm, maximize=True, percentile=percentile)
    optimizer = cls(params, maximize=True, percentile_clipping=percentile, state="32bit", **arguments)
    for _ in range(12):
        reference.step(set_gradients(params))
        optimizer.step()
    for param, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6)
    group = optimizer.param_groups[0]
    for param, moments in zip(params, reference.moments, strict=True):
        assert len(optimizer.moment_names(group)) == len(moments)
        for i, moment in enumerate(optimizer.moment_names(group), 1):
            largest = float(moments[moment].abs().max()) if param.numel() else 0.0
            actual = optimizer.state[param][f"state{i}"].double()
            torch.testing.assert_close(actual, moments[moment], rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("state", ["8bit", "fp8"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_few_bits_follow_float64_from_step_to_step(name: str, state: str) -> None:
    """With moments of its own at each step, the float64 reference is off by what one step rounds: nothing."""
    cls, arguments, algorithm = ALGORITHMS[name]
    (param,) = params = parameters([(20, 300)])
    optimizer = cls(params, state=state, **arguments)
    group = optimizer.param_groups[0]
    for t in range(1, 6):
        (grad,) = set_gradients(params)
        moments = algorithm.moments(param.detach().double())
        for i, moment in enumerate(optimizer.moment_names(group), 1):
            if t > 1:
                signed = optimizer.rule(group).signs[i - 1]
                moments[moment] = load_moment(optimizer.state[param], i, signed).double().clone()
        assert grad is not None
        expected = algorithm.update(param.detach().double(), grad.double(), moments, t)
        optimizer.step()
        largest_step = (expected - param.detach().double()).abs().max()
        torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6 + 1e-4 * float(largest_step))
    codes = {"8bit": torch.uint8, "fp8": torch.float8_e4m3fn}[state]
    assert all(optimizer.state[param][f"codes{i + 1}"].dtype == codes for i, _ in enumerate(moments))


@pytest.mark.parametrize("state", ["8bit", "fp8"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_resuming_changes_nothing(name: str, state: str) -> None:
    cls, arguments, _ = ALGORITHMS[name]
    options = {"state": state, "percentile_clipping": 5, "stochastic_rounding": True, **arguments}
    params = parameters([(33, 130), (7,)], torch.bfloat16)
    optimizer = cls(params, **options)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    copied = [Parameter(param.detach().clone()) for param in params]
    resumed = cls(copied, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        for param, grad in zip(copied, set_gradients(params), strict=True):
            param.grad = grad
        optimizer.step()
        resumed.step()
        assert all(torch.equal(a, b) for a, b in zip(params, copied, strict=True))


@pytest.mark.parametrize("prefix", ["Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS"])
def test_names_say_how_state_is_kept(prefix: str) -> None:
    arguments = {"momentum": 0.9} if prefix == "SGD" else {}
    for suffix, kind in (("", "float32"), ("8bit", "uint8"), ("32bit", "float32")):
        (param,) = parameters([(64, 64)])
        optimizer = getattr(optim, prefix + suffix)([param], **arguments)
        set_gradients([param])
        optimizer.step()
        state = optimizer.state[param]
        assert str(state.get("codes1", state.get("state1")).dtype) == f"torch.{kind}"


@pytest.mark.parametrize(
    "theirs", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_a_twin_computes_what_its_parent_computes_for_every_argument(theirs: type[torch.optim.Optimizer]) -> None:
    ours = optim.TWINS[theirs]
    choices: dict[str, list[Any]] = {
        "maximize": [False, True],
        "weight_decay": [0.0, 0.1],
        "momentum": [0.0, 0.9],
        "dampening": [0.0, 0.5],
        "nesterov": [False, True],
        "centered": [False, True],
        "lr_decay": [0.0, 0.3],
        "initial_accumulator_value": [0.0, 0.5],
        "decoupled_weight_decay": [False, True],
    }
    known = set(theirs.__init__.__code__.co_varnames)
    for name in known & choices.keys():
        for value in choices[name]:
            arguments: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.05, name: value}
            if "momentum" in known and name != "momentum":
                arguments["momentum"] = 0.8
            params = parameters([(64, 66), (5,)])
            copies = [Parameter(param.detach().clone()) for param in params]
            optimizer, reference = ours(params, state="32bit", **arguments), theirs(copies, **arguments)  # type: ignore[call-arg]
            for _ in range(4):
                for param, grad in zip(copies, set_gradients(params), strict=True):
                    param.grad = grad
                optimizer.step()
                reference.step()
            for param, expected in zip(params, copies, strict=True):
                torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6, msg=f"{arguments}")


def test_state_of_torch_is_converted_for_every_twin() -> None:
    for theirs, ours in optim.TWINS.items():
        arguments: dict[str, Any] = {"lr": 1e-2} | (
            {"momentum": 0.9} if theirs in (torch.optim.SGD, torch.optim.RMSprop) else {}
        )
        params = parameters([(64, 66)])
        reference = theirs(params, **arguments)
        set_gradients(params)
        reference.step()
        kept = {name: value.clone() for name, value in reference.state[params[0]].items() if name != "step"}
        optimizer = ours(params, state="32bit", **arguments)  # type: ignore[call-arg]
        optimizer.load_state_dict(reference.state_dict())
        state = optimizer.state[params[0]]
        names = optimizer.moment_names(optimizer.param_groups[0])
        assert set(names) == set(kept)
        assert all(torch.equal(state[f"state{i}"], kept[name]) for i, name in enumerate(names, 1))
        assert state["step"] == 1


def test_a_momentum_that_is_turned_on_later_begins_at_zero() -> None:
    params = parameters([(64, 66)])
    optimizer = optim.SGD8bit(params, lr=0.1)
    set_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    set_gradients(params)
    before = params[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 0.1 * params[0].grad, rtol=1e-5, atol=1e-6)
    assert "codes1" in optimizer.state[params[0]]


def test_stochastic_rounding_keeps_small_steps_on_average() -> None:
    """A step of a 64th of bfloat16's last place is lost by rounding to the nearest."""
    for stochastic, moved in ((False, 0.0), (True, 64 * 2.0**-14)):
        (param,) = params = [Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))]
        optimizer = optim.SGD(params, lr=2.0**-14, maximize=True, stochastic_rounding=stochastic)
        for _ in range(64):
            param.grad = torch.ones_like(param)
            optimizer.step()
        # of 65536 sums of 64 steps; the spread of one is below 2^-7, that of their mean 2^-15
        assert (param.float().mean() - 1).item() == pytest.approx(moved, abs=6 * 2.0**-15)


def test_random_bits_depend_on_seed_and_tensor() -> None:
    def run(seed: int) -> list[Parameter]:
        torch.manual_seed(3)
        start = torch.randn(64, 64).bfloat16()
        params = [Parameter(start.clone()), Parameter(start.clone())]
        optimizer = optim.AdamW8bit(params, lr=1e-4, stochastic_rounding=True, rounding_seed=seed)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("kind", "bits"), [("8bit", 16), ("32bit", 24)])
def test_master_weights_follow_float32(kind: str, bits: int) -> None:
    params = parameters([(64, 66), (7,)], torch.bfloat16)
    reference = [Parameter(param.detach().float()) for param in params]
    optimizer = optim.AdamW(params, lr=1e-4, master_weights=kind)
    plain = optim.AdamW(reference, lr=1e-4)
    for _ in range(20):
        for param, grad in zip(reference, set_gradients(params), strict=True):
            assert grad is not None
            param.grad = grad.float()
        optimizer.step()
        plain.step()
    for param, expected in zip(params, reference, strict=True):
        # one unit of bfloat16, because a weight of 24 bits may lie at its midpoint
        torch.testing.assert_close(param.float(), expected.detach(), rtol=2.0**-8, atol=1e-6)
        assert optimizer.state[param]["master"].dtype == (torch.int8 if kind == "8bit" else torch.float32)
    exact_share = torch.cat([(p == q.bfloat16()).flatten() for p, q in zip(params, reference, strict=True)])
    assert exact_share.float().mean() > (0.9 if bits == 16 else 0.999)


def test_a_weight_changed_from_outside_wins_over_its_master() -> None:
    (param,) = params = parameters([(64, 66)], torch.bfloat16)
    optimizer = optim.SGD(params, lr=1e-3, master_weights="32bit")
    set_gradients(params)
    optimizer.step()
    param.data.fill_(3.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (param == 3).all()


def test_one_norm_over_all_tensors_clips_all_alike() -> None:
    params = parameters([(64, 66), (7,)])
    scaled = [Parameter(param.detach().clone()) for param in params]
    optimizer = optim.SGD(params, lr=0.1, percentile_clipping=5, clip_scope="global")
    reference = optim.SGD(scaled, lr=0.1)
    for scale, factor in ((1.0, 1.0), (4.0, 0.25)):
        for param, other in zip(params, scaled, strict=True):
            param.grad = torch.full_like(param, scale)
            other.grad = torch.full_like(param, scale * factor)
        optimizer.step()
        reference.step()
    for param, expected in zip(params, scaled, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


def test_one_norm_needs_one_percentile() -> None:
    groups = [{"params": parameters([(3,)]), "clip_scope": "global"}, {"params": parameters([(3,)])}]
    optimizer = optim.AdamW(groups, percentile_clipping=5)
    for group in optimizer.param_groups:
        set_gradients(group["params"])
    with pytest.raises(ValueError, match="one norm over all param groups"):
        optimizer.step()


@pytest.mark.parametrize("option", [{"stochastic_rounding": True}, {"master_weights": "8bit"}])
def test_what_float16_cannot_have_raises_before_anything_is_modified(option: dict[str, Any]) -> None:
    params = parameters([(3, 4)], torch.float16)
    before = params[0].detach().clone()
    optimizer = optim.AdamW(params, **option)
    set_gradients(params)
    with pytest.raises(TypeError, match="take master_weights='32bit'"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Lion, optim.LAMB])
def test_update_clip_is_for_adam(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} has no update_clip"):
        cls(parameters(), update_clip="rms")


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(TypeError, match="AdamW8bit got optim_bits; it takes the options state, percentile_clipping"):
        optim.AdamW8bit(parameters(), optim_bits=8)


@pytest.mark.parametrize(("cls", "arguments"), [(optim.Lion, {"betas": (0.9, 1.0)}), (optim.LAMB, {"lr": -1.0})])
def test_hyper_parameters_out_of_range_raise(cls: type[LowBitOptimizer], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)|cannot be negative"):
        cls(parameters(), **arguments)


def test_adamw_takes_2_07_bytes_a_parameter() -> None:
    (param,) = params = parameters([(64, 512)], torch.bfloat16)
    optimizer = optim.AdamW8bit(params)
    set_gradients(params)
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[param].values())
    assert kept / param.numel() <= 2.0 + 8 / 256 + 4 / param.numel()
    assert 2.0 + 8 / 256 <= 2.07


def test_algorithms_are_those_of_the_reference() -> None:
    assert {type(algorithm) for *_, algorithm in ALGORITHMS.values()} == set(exact.ALGORITHMS.values())
    assert all(replace(algorithm) == algorithm for *_, algorithm in ALGORITHMS.values())  # type: ignore[type-var]
