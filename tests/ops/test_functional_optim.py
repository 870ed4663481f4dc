"""bitsandbytes' update functions: signatures, formulas in float64, flat blocks, the kernel against the reference."""

import inspect
from typing import Any

import float64_optimizers as exact
import pytest
import torch
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import dynamic_map
from lq_kernels.functional_optim import (
    _Hyper,
    _moments,
    _rule,
    _update,
    launch_flat,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
)
from torch import Tensor

LR, BETA1, BETA2, BETA3, ALPHA, EPS, DECAY = 1e-2, 0.9, 0.99, 0.999, 3.0, 1e-6, 0.1
ALGORITHMS: dict[str, exact.Algorithm] = {
    "adam": exact.AdamW(LR, (BETA1, BETA2), EPS, DECAY),
    "lamb": exact.AdamW(LR, (BETA1, BETA2), EPS, DECAY),
    "ademamix": exact.AdEMAMix(LR, (BETA1, BETA2, BETA3), ALPHA, EPS, DECAY),
    "momentum": exact.SGD(LR, BETA1, weight_decay=DECAY),
    "lars": exact.SGD(LR, BETA1, weight_decay=DECAY),
    "rmsprop": exact.RMSprop(LR, BETA1, EPS, DECAY),
    "adagrad": exact.Adagrad(LR, weight_decay=DECAY, eps=EPS),
    "lion": exact.Lion(LR, (BETA1, BETA2), DECAY),
}
SIGNED, UNSIGNED = dynamic_map("dynamic"), dynamic_map("dynamic_unsigned")


def states(name: str, shape: tuple[int, ...], **kind: Any) -> tuple[Tensor, Tensor | None]:
    first = torch.zeros((2, *shape) if name == "ademamix" else shape, **kind)
    return first, torch.zeros(shape, **kind) if name in ("adam", "lamb", "ademamix") else None


def update_32bit(name: str, g: Tensor, p: Tensor, kept: tuple[Tensor, Tensor | None], step: int, **more: Any) -> None:
    hyper = {"state2": kept[1], "beta2": BETA2, "beta3": BETA3, "alpha": ALPHA, "weight_decay": DECAY}
    optimizer_update_32bit(name, g, p, kept[0], BETA1, EPS, step, LR, **hyper, **more)


@pytest.mark.parametrize("function", [optimizer_update_32bit, optimizer_update_8bit_blockwise])
def test_names_order_and_defaults_are_those_of_bitsandbytes(function: Any) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = inspect.signature(getattr(functional, function.__name__)).parameters
    ours = inspect.signature(function).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_32_bits_follow_float64(name: str) -> None:
    algorithm = ALGORITHMS[name]
    p = torch.randn(33, 31) * 0.1
    kept, expected = states(name, (33, 31)), p.double()
    moments = algorithm.moments(expected)
    for t in range(1, 6):
        g = torch.randn(33, 31)
        update_32bit(name, g, p, kept, t, gnorm_scale=0.5)
        expected = algorithm.update(expected, 0.5 * g.double(), moments, t)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("numel", [8192, 8193, 100])
def test_8_bits_update_by_the_moments_before_they_are_quantised(name: str, numel: int) -> None:
    algorithm = ALGORITHMS[name]
    p, g = torch.randn(numel) * 0.1, torch.randn(numel)
    codes = states(name, (numel,), dtype=torch.uint8)
    blocks = -(-numel // 256)
    absmax1 = torch.zeros(2, blocks) if name == "ademamix" else torch.zeros(blocks)
    absmax2 = None if codes[1] is None else torch.zeros(blocks)
    maps = SIGNED, None if codes[1] is None else UNSIGNED
    expected, moments = p.double(), algorithm.moments(p.double())
    for t in (1, 2, 3):
        optimizer_update_8bit_blockwise(
            name, g, p, *codes, BETA1, BETA2, BETA3, ALPHA, EPS, t, LR, *maps, absmax1, absmax2, DECAY
        )
        expected = algorithm.update(expected, g.double(), moments, t)
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=2e-6)
        places = {"exp_avg_sq": (codes[1], absmax2, UNSIGNED)} if codes[1] is not None else {}
        rows = [(codes[0], absmax1)] if name != "ademamix" else list(zip(codes[0], absmax1, strict=True))
        for key, (own, absmax) in zip([k for k in moments if k not in places], rows, strict=True):
            places[key] = own, absmax, SIGNED
        for key, (own, absmax, code) in places.items():
            wanted, scale = quantize_blockwise(moments[key].float(), code)
            torch.testing.assert_close(absmax, scale, rtol=1e-5, atol=0)
            assert (own.int() - wanted.int()).abs().float().mean() < 1e-3
            moments[key] = dequantize_blockwise(own, absmax, code).double()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_skip_zeros_leaves_elements_without_a_gradient_as_they_are(name: str) -> None:
    p, kept = torch.randn(300), states(name, (300,))
    update_32bit(name, torch.randn(300), p, kept, 1)
    before = p.clone(), [None if state is None else state.clone() for state in kept]
    g = torch.randn(300)
    g[::3] = 0
    update_32bit(name, g, p, kept, 2, skip_zeros=True)
    assert torch.equal(p == before[0], g == 0)
    for state, old in zip(kept, before[1], strict=True):
        assert state is None or torch.equal(state[..., ::3], old[..., ::3])


@pytest.mark.parametrize("name", ["adam", "lamb", "momentum", "lars", "rmsprop"])
def test_max_unorm_clips_the_update_to_the_norm_of_the_parameter(name: str) -> None:
    p, g, unorm = torch.randn(300), torch.randn(300) * 50, torch.zeros(1)
    clipped, free = p.clone(), p.clone()
    update_32bit(name, g, free, states(name, (300,)), 1)
    update_32bit(name, g, clipped, states(name, (300,)), 1, max_unorm=0.01, unorm_vec=unorm)
    kept = p * (1 - LR * DECAY) if name in ("adam", "lamb") else p
    torch.testing.assert_close(unorm[0], (free - kept).norm() / LR, rtol=1e-4, atol=0)
    torch.testing.assert_close((clipped - kept).norm(), LR * 0.01 * p.norm(), rtol=1e-3, atol=0)
    unclipped = p.clone()
    update_32bit(name, g, unclipped, states(name, (300,)), 1, max_unorm=1e9)
    torch.testing.assert_close(unclipped, free, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_kernel_steps_as_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    rule = _rule(name, _Hyper(BETA1, BETA2, BETA3, ALPHA, EPS, DECAY, LR))
    p, g, kept = torch.randn(1500).to(dtype), torch.randn(1500).to(dtype), states(name, (1500,))
    g[::5] = 0
    for state in kept:
        if state is not None:
            state.uniform_()
    expected, expected_moments = p.clone(), [moment.clone() for moment in _moments(*kept, rule)]
    got, got_moments = p.to(device).clone(), [moment.to(device).clone() for moment in expected_moments]
    trust = torch.tensor(0.25)
    _update(rule, expected, g, expected_moments, 3, 0.5, trust, True)
    numbers = torch.tensor(rule.numbers(LR, 3), device=device)
    kept_share = 1 - LR * DECAY if name in ("adam", "lamb") else 1.0
    launch_flat(rule, got, g.to(device), got_moments, numbers, 0.5, trust.to(device), True, kept_share)
    torch.testing.assert_close(got.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for a, b in zip(got_moments, expected_moments, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer_name": "adamw"}, "no optimizer is called 'adamw'; known: adam, lamb"),
        ({"g": torch.zeros(4)}, r"g \(4,\) on cpu is not the gradient of p \(3,\)"),
        ({"state1": torch.zeros(4)}, r"state1 of 'adam' is a contiguous torch.float32 of shape \(3,\)"),
        ({"state1": torch.zeros(3, dtype=torch.uint8)}, "got torch.uint8"),
        ({"state2": None}, "'adam' has two states"),
    ],
    ids=str,
)
def test_what_does_not_fit_raises(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"optimizer_name": "adam", "state2": torch.zeros(3)}
    arguments |= {name: torch.zeros(3) for name in ("g", "p", "state1")}
    with pytest.raises(ValueError, match=message):
        optimizer_update_32bit(**{**arguments, **change}, beta1=0.9, eps=1e-8, step=1, lr=0.1)


def test_scales_of_another_block_size_are_refused() -> None:
    zeros, codes = torch.zeros(4096), torch.zeros(4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"absmax of shape \(16,\), got torch.float32 \(2,\)"):
        optimizer_update_8bit_blockwise(
            "lion", zeros, zeros, codes, None, 0.9, 0.99, 0, 0, 0, 1, 0.1, SIGNED, None, torch.zeros(2), None
        )
