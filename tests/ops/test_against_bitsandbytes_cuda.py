"""bitsandbytes' CUDA kernels beside ours on a GPU: what is equal, and how far apart the rest is, and why.

docs/migrating_from_bitsandbytes.md lists the differences; each has a test here.
"""

from typing import Any

import pytest
import torch
from hostile import heavy_tailed
from lq_kernels import functional as F
from torch import Tensor

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BOTH = (bnb.functional, F)


def values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Heavy tails, within the range of float16; no row is zero."""
    return heavy_tailed(rows + 1, columns).flip(0)[1:].clamp(-200, 200).to(GPU, dtype)


def ours_of(state: Any) -> F.QuantState:
    return F.QuantState.from_dict(state.as_dict(packed=True), GPU)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_8_bit_codes_differ_by_one_at_most_where_a_value_lies_between_two(blocksize: int, dtype: torch.dtype) -> None:
    x = values(300, 1024, dtype)
    (theirs, state), (ours, same) = (f.quantize_blockwise(x, blocksize=blocksize) for f in BOTH)
    assert torch.equal(state.absmax, same.absmax)
    apart = (theirs.int() - ours.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.005
    read = F.QuantState(absmax=state.absmax, code=state.code, blocksize=blocksize, dtype=dtype)
    assert torch.equal(F.dequantize_blockwise(theirs, read), bnb.functional.dequantize_blockwise(theirs, state))
    exact, error = x.double(), {}
    for f, codes, its in ((bnb.functional, theirs, state), (F, ours, same)):
        error[f] = (f.dequantize_blockwise(codes, its).double() - exact).abs()
    # Both are the nearest in float32 but for roundings of the quotient; then the value is rounded to dtype.
    slack = 2**-21 + torch.finfo(dtype).eps * (dtype != torch.float32)
    assert (error[F] <= error[bnb.functional] + slack * exact.abs()).all()


@pytest.mark.parametrize("quantize", ["quantize_blockwise", "quantize_nf4", "quantize_fp4"])
def test_a_block_of_zeros_has_the_code_of_zero_here(quantize: str) -> None:
    x = torch.zeros(512, device=GPU)
    (theirs, their_state), (ours, our_state) = (getattr(f, quantize)(x) for f in BOTH)
    dequantize = quantize.replace("quantize", "dequantize")
    for f, codes, state in ((bnb.functional, theirs, their_state), (F, ours, our_state)):
        assert not getattr(f, dequantize)(codes, state).any()
    # Theirs are of the lowest value, which times 0 is -0.0.
    assert (theirs == 0).all()
    assert not torch.signbit(getattr(F, dequantize)(ours, our_state)).any()


def test_a_nan_poisons_its_block_here_and_becomes_a_number_there() -> None:
    x = torch.ones(512, device=GPU)
    x[3] = torch.nan
    (theirs, state), (ours, same) = (f.quantize_blockwise(x, blocksize=256) for f in BOTH)
    assert bnb.functional.dequantize_blockwise(theirs, state).isfinite().all()
    restored = F.dequantize_blockwise(ours, same)
    assert restored[:256].isnan().all()
    assert (restored[256:] == 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_nf4_bytes_are_equal(blocksize: int, dtype: torch.dtype) -> None:
    x = values(300, 1024, dtype)
    (theirs, state), (ours, same) = (f.quantize_4bit(x, blocksize=blocksize, quant_type="nf4") for f in BOTH)
    assert torch.equal(ours, theirs)
    assert torch.equal(state.absmax, same.absmax)
    assert torch.equal(F.dequantize_4bit(theirs, ours_of(state)), bnb.functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_fp4_values_are_equal_but_for_ties(blocksize: int, dtype: torch.dtype) -> None:
    x = values(300, 1024, dtype)
    (theirs, state), (ours, same) = (f.quantize_4bit(x, blocksize=blocksize, quant_type="fp4") for f in BOTH)
    assert torch.equal(state.absmax, same.absmax)
    values_there, values_here = bnb.functional.dequantize_4bit(theirs, state), F.dequantize_4bit(ours, same)
    tie = values_there != values_here
    assert tie.float().mean() < 2e-3
    middle = (values_there[tie].float() + values_here[tie].float()) / 2
    torch.testing.assert_close(middle, x[tie].float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (values_there[tie].abs() > values_here[tie].abs()).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_scales_differ_by_the_order_of_a_sum(quant_type: str, dtype: torch.dtype) -> None:
    x = values(300, 1024, dtype)
    (theirs, state), (_, same) = (f.quantize_4bit(x, compress_statistics=True, quant_type=quant_type) for f in BOTH)
    assert torch.equal(state.absmax, same.absmax)
    # The mean of 4800 maxima, added up in another order.
    torch.testing.assert_close(same.offset, state.offset, rtol=2**-20, atol=0)
    torch.testing.assert_close(same.state2.absmax, state.state2.absmax, rtol=2**-18, atol=2**-20)
    ours = F.dequantize_4bit(theirs, ours_of(state))
    # One product more is rounded there.
    rtol = 2**-17 + torch.finfo(dtype).eps * (dtype != torch.float32)
    torch.testing.assert_close(ours, bnb.functional.dequantize_4bit(theirs, state), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_4_bit_products_are_nearer_to_the_exact_ones(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(1024, 2048), torch.randn(rows, 2048).to(GPU, dtype), torch.randn(1024).to(GPU, dtype)
    packed, state = bnb.functional.quantize_4bit(weight.to(GPU, dtype), quant_type="nf4")
    exact = x.double() @ bnb.functional.dequantize_4bit(packed, state).double().t() + bias.double()
    theirs = bnb.matmul_4bit(x, packed.t(), state, bias=bias)
    ours = F.matmul_4bit(x, packed.t(), ours_of(state), bias=bias)
    size = (x.double().abs() @ bnb.functional.dequantize_4bit(packed, state).double().abs().t()) + bias.abs().double()
    bound = torch.finfo(dtype).eps * exact.abs() + 2**-14 * size * (dtype == torch.float32) + 2**-20 * size
    error = (ours.double() - exact).abs()
    # W is rounded to dtype before its product: float32 products of fewer rows skip that.
    assert (error <= bound + torch.finfo(dtype).eps * size / 16).all()
    # With few rows theirs multiplies codes and absmax in dtype, and adds the bias to a rounded sum.
    if dtype != torch.float32:
        assert error.square().mean() <= 1.01 * (theirs.double() - exact).square().mean()


@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_int8_codes_by_row(threshold: float) -> None:
    x = values(256, 1024, torch.float16)
    theirs, ours = (f.int8_vectorwise_quant(x, threshold) for f in BOTH)
    apart = (theirs[0].int() - ours[0].int()).abs()
    # x * (127 / absmax) there and here, in roundings of its own
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 2e-3
    assert torch.equal(theirs[1], ours[1])
    assert threshold == 0 or torch.equal(theirs[2], ours[2])


def test_int8_codes_by_column_are_rounded_once_here() -> None:
    x = values(256, 1024, torch.float16)
    theirs, ours = (f.int8_double_quant(x) for f in BOTH)
    assert torch.equal(theirs[3], ours[3])
    apart = (theirs[1].int() - ours[1].int()).abs()
    # 127 x is rounded to float16 there.
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.1
    exact = (x.double() * 127 / ours[3]).nan_to_num()
    assert ((ours[1].double() - exact).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("columns", [4096, 4094])
def test_int8_products_are_exact_here_for_every_size(columns: int) -> None:
    a = torch.full((64, columns), 127, dtype=torch.int8, device=GPU)
    a[0, 0] = 126
    exact = a.double() @ a.double().t()
    theirs, ours = (f.int8_linear_matmul(a, a).double() for f in BOTH)
    assert torch.equal(ours, exact)
    # Where 4 does not divide K theirs are float32 products, beyond 2^24 here.
    assert torch.equal(theirs, exact) == (columns % 4 == 0)


def test_int8_results_agree_and_do_not_pass_through_float16_here() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(256, 512).half(), torch.randn(128, 512).half(), torch.randn(128).half()
    (CA, SCA, _), (CB, SCB, _) = (F.int8_vectorwise_quant(t.to(GPU)) for t in (x, weight))
    total = F.int8_linear_matmul(CA, CB)
    theirs, ours = (f.int8_mm_dequant(total, SCA, SCB, bias=bias.to(GPU)) for f in BOTH)
    exact = total.double() * SCA[:, None].double() * SCB.double() / 127**2 + bias.to(GPU).double()
    for value in (theirs, ours):
        torch.testing.assert_close(value.double(), exact, rtol=2**-11, atol=2**-24 * 256)
    assert (theirs == ours).float().mean() > 0.999
    torch.testing.assert_close(*(f.int8_vectorwise_dequant(CA, SCA) for f in BOTH), rtol=2**-22, atol=0)
    large = SCA * 1000
    theirs, ours = (
        f(CA, CB, large, SCB, None, torch.float32) for f in (torch.ops.bitsandbytes.int8_scaled_mm, F.int8_scaled_mm)
    )
    assert theirs.isinf().any()
    torch.testing.assert_close(
        ours.double(), total.double() * large[:, None].double() * SCB.double() / 127**2, rtol=2**-20, atol=0
    )


STATES = {"adam": 2, "ademamix": 2, "lion": 1, "momentum": 1, "rmsprop": 1, "adagrad": 1}
NUMEL = 8192


def run_32bit(functional: Any, name: str, dtype: torch.dtype, weight_decay: float) -> list[Tensor | None]:
    torch.manual_seed(0)
    p = (torch.randn(NUMEL) * 0.1).to(GPU, dtype)
    state1 = torch.zeros((2, NUMEL) if name == "ademamix" else NUMEL, device=GPU)
    state2 = torch.zeros(NUMEL, device=GPU) if STATES[name] == 2 else None
    for step in range(1, 11):
        g = (torch.randn(NUMEL) * 0.1).to(GPU, dtype)
        functional.optimizer_update_32bit(
            name, g, p, state1, 0.9, 1e-6, step, 1e-3, state2, 0.99, 0.999, 3.0, weight_decay, 0.5
        )
    return [p, state1, state2]


@pytest.mark.parametrize("name", STATES)
def test_32_bit_updates_agree(name: str) -> None:
    for theirs, ours in zip(*(run_32bit(f, name, torch.float32, 0.0) for f in BOTH), strict=True):
        # 10 steps of lr 1e-3, each off by a few roundings
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "ademamix"])
def test_weights_decay_before_the_update_here_and_after_it_there(name: str) -> None:
    theirs, ours = (run_32bit(f, name, torch.float32, 0.1)[0] for f in BOTH)
    # An update is at most about lr 1e-3 (times 1 + alpha), and decays by lr * 0.1 where the order is the other.
    assert 1e-8 < (theirs - ours).abs().max() < 10 * 4 * 1e-3 * 1e-4


def run_8bit(functional: Any, name: str, steps: int, weight_decay: float, gnorm_scale: float) -> list[Tensor | None]:
    torch.manual_seed(0)
    p = (torch.randn(NUMEL) * 0.1).to(GPU)
    maps = [bnb.functional.create_dynamic_map(signed=signed).to(GPU) for signed in (True, False)]
    two, averages = STATES[name] == 2, (2,) if name == "ademamix" else ()
    codes1 = torch.zeros((*averages, NUMEL), dtype=torch.uint8, device=GPU)
    codes1[:] = 127 if name not in ("rmsprop", "adagrad") else 0
    codes2 = torch.zeros(NUMEL, dtype=torch.uint8, device=GPU) if two else None
    absmax1 = torch.zeros((*averages, NUMEL // 256), device=GPU)
    absmax2 = torch.zeros(NUMEL // 256, device=GPU) if two else None
    map1 = maps[1] if name in ("rmsprop", "adagrad") else maps[0]
    for step in range(1, steps + 1):
        g = (torch.randn(NUMEL) * 0.1).to(GPU)
        functional.optimizer_update_8bit_blockwise(
            *(name, g, p, codes1, codes2, 0.9, 0.99, 0.999, 3.0, 1e-6, step, 1e-3),
            *(map1, maps[1], absmax1, absmax2, weight_decay),
            gnorm_scale=gnorm_scale,
        )
    return [p, codes1, codes2, absmax1, absmax2]


@pytest.mark.parametrize("name", STATES)
def test_8_bit_updates_agree(name: str) -> None:
    theirs, ours = (run_8bit(f, name, steps=10, weight_decay=0.0, gnorm_scale=1.0) for f in BOTH)
    # A value between two codes may get either, and is off by their distance from then on.
    assert ((ours[0] - theirs[0]).abs() > 1e-6).float().mean() < 0.001
    for i in (1, 2):
        if ours[i] is not None:
            apart = (ours[i].int() - theirs[i].int()).abs()
            assert (apart > 0).float().mean() < 0.005
    for i in (3, 4):
        assert ours[i] is None or torch.allclose(ours[i], theirs[i], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["rmsprop", "adagrad"])
def test_gnorm_scale_reaches_the_step_here_and_only_the_state_there(name: str) -> None:
    scaled = [run_8bit(f, name, steps=1, weight_decay=0.0, gnorm_scale=0.5)[0] for f in BOTH]
    plain = [run_8bit(f, name, steps=1, weight_decay=0.0, gnorm_scale=1.0)[0] for f in BOTH]
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-6)
    # Both divide by the root of a state that is scaled; theirs divides the gradient as it came.
    start = run_8bit(F, name, steps=0, weight_decay=0.0, gnorm_scale=1.0)[0]
    torch.testing.assert_close(scaled[0] - start, 2 * (scaled[1] - start), rtol=0.01, atol=1e-5)
