"""The float64 references against torch's optimizers in float64, bitsandbytes' in float32, and properties of papers."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from float64_optimizers import (
    ALGORITHMS,
    LAMB,
    LARS,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    AdEMAMix,
    Algorithm,
    Float64Optimizer,
    Lion,
    PercentileClipping,
    RMSprop,
    update_clip,
)
from torch import Tensor
from torch.nn import Parameter

SHAPES = [(5, 7), (37,), (), (2, 3, 4), (0, 3)]

# Rounding of float64 over 12 steps; one wrong term is off by 1e-3 of a step or more.
ROUNDING = {"rtol": 1e-12, "atol": 1e-14}


def parameters() -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def gradients(steps: int) -> Iterator[list[Tensor | None]]:
    """Of very different sizes; the first tensor has none in step 3, the second a zero one in step 5."""
    for step in range(1, steps + 1):
        grads: list[Tensor | None] = [torch.randn(shape, dtype=torch.float64) * 10.0 ** -(step % 4) for shape in SHAPES]
        if step == 3:
            grads[0] = None
        if step == 5:
            grads[1] = torch.zeros(SHAPES[1], dtype=torch.float64)
        yield grads


WITH_DECAY = {"weight_decay": 0.1}
TORCH_CASES: list[tuple[type[Algorithm], type[torch.optim.Optimizer], dict[str, Any]]] = [
    (Adam, torch.optim.Adam, {}),
    (Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-3, **WITH_DECAY}),
    (Adam, torch.optim.Adam, {"betas": (0.0, 0.9), "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {}),
    (AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-3, **WITH_DECAY}),
    (SGD, torch.optim.SGD, {}),
    (SGD, torch.optim.SGD, {"lr": 0.1, **WITH_DECAY}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, **WITH_DECAY}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, **WITH_DECAY}),
    (RMSprop, torch.optim.RMSprop, {}),
    (RMSprop, torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.8, "eps": 1e-3, **WITH_DECAY}),
    (RMSprop, torch.optim.RMSprop, {"momentum": 0.9, **WITH_DECAY}),
    (RMSprop, torch.optim.RMSprop, {"centered": True, **WITH_DECAY}),
    (RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "alpha": 0.8}),
    (Adagrad, torch.optim.Adagrad, {}),
    (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-3, **WITH_DECAY}),
    (Adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("algorithm", "theirs", "arguments"), TORCH_CASES, ids=str)
def test_torch_computes_the_same_in_float64(
    algorithm: Callable[..., Algorithm], theirs: Callable[..., torch.optim.Optimizer], arguments: dict, maximize: bool
) -> None:
    params = [Parameter(p) for p in parameters()]
    reference = Float64Optimizer(params, algorithm(**arguments), maximize=maximize)
    optimizer = theirs(params, maximize=maximize, **arguments)
    for grads in gradients(12):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        reference.step(grads)
    assert reference.steps == [11, 12, 12, 12, 12]
    for param, mine, moments in zip(params, reference.params, reference.moments, strict=True):
        torch.testing.assert_close(mine, param.detach(), **ROUNDING)
        torch_moments = {key: value for key, value in optimizer.state[param].items() if key != "step"}
        torch.testing.assert_close(moments, torch_moments, **ROUNDING)


BNB_CASES: list[tuple[str, Algorithm, dict[str, Any]]] = [
    ("AdamW32bit", AdamW(1e-3, (0.9, 0.99), 1e-6, 0.1), {"betas": (0.9, 0.99), "eps": 1e-6}),
    ("Adam32bit", AdamW(1e-3, (0.9, 0.99), 1e-6, 0.1), {"betas": (0.9, 0.99), "eps": 1e-6}),  # decoupled there
    ("Lion32bit", Lion(1e-3, (0.9, 0.99), 0.1), {"betas": (0.9, 0.99)}),
    ("SGD32bit", SGD(1e-3, 0.9, 0.0, 0.1), {"momentum": 0.9}),
    ("RMSprop32bit", RMSprop(1e-3, 0.95, 1e-6, 0.1), {"alpha": 0.95, "eps": 1e-6}),
    ("Adagrad32bit", Adagrad(1e-3, weight_decay=0.1, eps=1e-6), {"eps": 1e-6}),
    (
        "AdEMAMix",
        AdEMAMix(1e-3, (0.9, 0.99, 0.999), 3.0, 1e-6, 0.1),
        {"betas": (0.9, 0.99, 0.999), "alpha": 3.0, "eps": 1e-6},
    ),
    (
        "AdEMAMix",
        AdEMAMix(1e-3, (0.9, 0.99, 0.999), 3.0, 1e-6, 0.1, t_alpha=7, t_beta3=9),
        {"betas": (0.9, 0.99, 0.999), "alpha": 3.0, "eps": 1e-6, "t_alpha": 7, "t_beta3": 9},
    ),
]


@pytest.mark.filterwarnings("ignore")  # bitsandbytes looks for packages that are not here
@pytest.mark.parametrize(("name", "algorithm", "arguments"), BNB_CASES, ids=str)
def test_bitsandbytes_computes_the_same_in_32_bits(name: str, algorithm: Algorithm, arguments: dict) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [Parameter(torch.randn(n) * 0.1) for n in (1000, 37)]
    reference = Float64Optimizer(params, algorithm)
    optimizer = getattr(bitsandbytes.optim, name)(params, lr=1e-3, weight_decay=0.1, **arguments)
    for _ in range(12):
        for param in params:
            param.grad = torch.randn_like(param) * 0.1
        grads = [param.grad.double() for param in params]
        optimizer.step()
        reference.step(grads)
    for param, mine in zip(params, reference.params, strict=True):
        # float32 rounds p, about 0.1 .. 0.4, by 3e-8 in each of 12 steps; a step is 1e-3.
        torch.testing.assert_close(mine, param.detach().double(), rtol=0, atol=4e-7)


def test_lion_steps_by_the_learning_rate_and_stays_where_there_is_no_gradient() -> None:
    p = torch.randn(3, 5, dtype=torch.float64)
    grad = torch.randn(3, 5, dtype=torch.float64)
    grad[:, 0] = 0
    reference = Float64Optimizer([p], Lion(lr=0.25))
    reference.step([grad])
    assert torch.equal(reference.params[0], p - 0.25 * grad.sign())
    torch.testing.assert_close(reference.moments[0]["exp_avg"], 0.01 * grad, **ROUNDING)


def test_the_schedules_of_ademamix_begin_near_zero_and_end_at_their_values() -> None:
    algorithm = AdEMAMix(betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=100, t_beta3=100)
    assert algorithm.alpha_at(1) == pytest.approx(0.05)
    assert [algorithm.alpha_at(t) for t in (50, 100, 1000)] == pytest.approx([2.5, 5.0, 5.0])
    # The paper makes the half-life ln(1/2) / ln(beta3) linear in t, from that of beta1 to that of beta3.
    half_lives = [math.log(0.5) / math.log(algorithm.beta3_at(t)) for t in (0, 25, 50, 100, 1000)]
    first, last = math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.9999)
    assert half_lives == pytest.approx([first, first + (last - first) / 4, (first + last) / 2, last, last])
    constant = AdEMAMix()
    assert (constant.alpha_at(1), constant.beta3_at(1)) == (5.0, 0.9999)


def test_lamb_is_adams_direction_at_the_length_of_the_parameter() -> None:
    param = Parameter(torch.randn(13, 4, dtype=torch.float64))
    reference = Float64Optimizer([param], LAMB(lr=0.01, weight_decay=0.2))
    adam = torch.optim.Adam([param], lr=1.0)
    for _ in range(5):
        before = param.detach().clone()
        param.grad = torch.randn_like(param)
        adam.step()
        direction = before - param.detach() + 0.2 * before
        param.data = before - 0.01 * before.norm() / direction.norm() * direction
        reference.step([param.grad])
        torch.testing.assert_close(reference.params[0], param.detach(), **ROUNDING)
        assert (reference.params[0] - before).norm() == pytest.approx(0.01 * before.norm())


def test_lars_is_sgd_with_momentum_on_steps_of_local_length() -> None:
    param = Parameter(torch.randn(13, 4, dtype=torch.float64))
    reference = Float64Optimizer([param], LARS(lr=0.5, momentum=0.8, weight_decay=0.2, trust=0.01))
    sgd = torch.optim.SGD([param], lr=1.0, momentum=0.8)
    for _ in range(5):
        grad, p = torch.randn_like(param), param.detach()
        local = 0.01 * p.norm() / (grad.norm() + 0.2 * p.norm())
        param.grad = 0.5 * local * (grad + 0.2 * p)
        sgd.step()
        reference.step([grad])
        torch.testing.assert_close(reference.params[0], param.detach(), **ROUNDING)


@pytest.mark.parametrize("algorithm", [LAMB(lr=0.1), LARS(lr=0.1)], ids=str)
@pytest.mark.parametrize("zero", ["parameter", "gradient", "both"])
def test_trust_ratios_of_zero_norms_are_one(algorithm: Algorithm, zero: str) -> None:
    p = torch.zeros(4, 3) if zero != "gradient" else torch.ones(4, 3)
    grad = torch.zeros(4, 3) if zero != "parameter" else torch.ones(4, 3)
    reference = Float64Optimizer([p], algorithm)
    reference.step([grad])
    moved = -0.1 if zero == "parameter" else 0.0
    torch.testing.assert_close(reference.params[0], p.double() + moved, rtol=1e-7, atol=0)


def test_the_update_clip_shortens_a_surge_and_nothing_else() -> None:
    quiet = torch.ones(4, 4, dtype=torch.float64)
    plain, stable = (Float64Optimizer([quiet], AdamW(weight_decay=0.1, stable=stable)) for stable in (False, True))
    for _ in range(5):
        for reference in (plain, stable):
            reference.step([quiet])
    assert torch.equal(plain.params[0], stable.params[0])  # g^2 = v_hat: the RMS is 1 but for rounding
    before = stable.params[0]
    plain.step([100 * quiet])
    stable.step([100 * quiet])
    v_hat = stable.moments[0]["exp_avg_sq"] / (1 - 0.999**6)
    rms = (100 / v_hat.sqrt()).mean().item()
    assert rms > 2
    torch.testing.assert_close(before - stable.params[0], (before - plain.params[0]) / rms, **ROUNDING)


def test_the_update_clip_ignores_what_is_below_eps_and_tensors_without_values() -> None:
    tiny = torch.full((3,), 1e-12, dtype=torch.float64)
    assert update_clip(tiny, torch.zeros(3, dtype=torch.float64), 1e-8) == 1.0
    # Variances between eps^2 and eps count in full.
    assert update_clip(tiny * 5e7, torch.full_like(tiny, 1e-10), 1e-8) == pytest.approx(5.0)
    assert update_clip(torch.empty(0), torch.empty(0), 1e-8) == 1.0


def test_the_first_norm_fills_the_history_and_later_ones_replace_the_oldest() -> None:
    clipping = PercentileClipping(5)
    norms = [2.0, *(float(n) for n in range(3, 103))]
    for norm in norms:
        clipping.factor(torch.tensor([norm, 0.0]))
    assert sorted(clipping.history) == norms[1:]  # 101 norms: the first is gone
    assert clipping.recorded == 101


@pytest.mark.parametrize("percentile", [1, 5, 50])
def test_a_gradient_is_clipped_at_the_percentile_of_its_norms(percentile: int) -> None:
    clipping = PercentileClipping(percentile)
    window: list[float] = []
    for step in range(250):
        grad = torch.randn(5) * (1 + step % 7)
        norm = grad.double().norm().item()
        window = [*window, norm][-100:] if window else [norm]
        slots = [window[0]] * (100 - len(window)) + window
        factor = clipping.factor(grad)
        assert factor == pytest.approx(min(1.0, sorted(slots)[percentile] / norm))
    assert 0 < clipping.clipped < 250


def test_zero_and_non_finite_norms_do_not_enter_the_history() -> None:
    clipping = PercentileClipping(5)
    assert clipping.factor(torch.zeros(3)) == 1.0
    assert clipping.factor(torch.tensor([1.0, math.inf])) is None
    assert clipping.factor(torch.tensor([1.0, math.nan])) is None
    assert (clipping.history, clipping.recorded, clipping.skipped) == ([], 0, 2)
    assert clipping.factor(torch.ones(4)) == 1.0
    assert clipping.history == [2.0] * 100


def test_a_skipped_gradient_leaves_parameter_moments_and_step() -> None:
    p = torch.ones(3)
    reference = Float64Optimizer([p, p], AdamW(), percentile=5)
    reference.step([torch.tensor([1.0, math.nan, 1.0]), torch.ones(3)])
    assert torch.equal(reference.params[0], p.double())
    assert reference.steps == [0, 1]
    assert not reference.moments[0]["exp_avg"].any()
    assert not torch.equal(reference.params[1], p.double())


def test_the_table_has_every_algorithm_under_its_name() -> None:
    assert set(ALGORITHMS) == {"adam", "adamw", "ademamix", "lion", "sgd", "rmsprop", "adagrad", "lamb", "lars"}
    for algorithm in ALGORITHMS.values():
        reference = Float64Optimizer([torch.ones(2, 2)], algorithm())
        reference.step([torch.ones(2, 2)])
        assert (reference.params[0] < 1).all()
