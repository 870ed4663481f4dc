"""What quantisation promises for any values, whatever the format: zeros stay, nothing else is nearer, order is kept."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.codebooks import dynamic_map, four_bit_map
from lq_kernels.rowwise import (
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from torch import Tensor

COLUMNS = 64  # one block of the blockwise formats for each row

every_run_the_same = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=15
)

Quantized = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Format:
    """`quantize`: x (M, COLUMNS) -> x read back, and scale in a shape that fits it; `values`: what codes stand for."""

    quantize: Callable[[Tensor], Quantized]
    values: Tensor
    symmetric: bool = True


def read_back(quantize: Callable[..., Quantized], dtype: torch.dtype) -> Callable[[Tensor], Quantized]:
    def quantized(x: Tensor) -> Quantized:
        codes, scale = quantize(x, dtype)
        return codes.float() * scale, scale

    return quantized


def by_code_book(code: Tensor) -> Callable[[Tensor], Quantized]:
    def quantized(x: Tensor) -> Quantized:
        codes, scale = quantize_blockwise(x, code, COLUMNS)
        return dequantize_blockwise(codes, scale, code, COLUMNS), scale[:, None]

    return quantized


def in_4_bits(quant_type: str) -> Callable[[Tensor], Quantized]:
    def quantized(x: Tensor) -> Quantized:
        packed, scale = quantize_4bit(x, COLUMNS, quant_type)
        return dequantize_4bit(packed, scale, COLUMNS, quant_type, list(x.shape), torch.float32), scale[:, None]

    return quantized


def finite(dtype: torch.dtype) -> Tensor:
    values = torch.arange(256).to(torch.uint8).view(dtype).float()
    return values[values.isfinite()]


INT8 = torch.arange(-127.0, 128.0)
FORMATS = {
    **{
        f"{quantize.name} {values_of}": Format(read_back(quantize, dtype), values)
        for quantize in (quantize_rowwise, quantize_columnwise, quantize_tensorwise)
        for values_of, dtype, values in (
            ("int8", torch.int8, INT8),
            ("e4m3", torch.float8_e4m3fn, finite(torch.float8_e4m3fn)),
            ("e5m2", torch.float8_e5m2, finite(torch.float8_e5m2)),
        )
    },
    **{
        f"blockwise {name}": Format(by_code_book(dynamic_map(name)), dynamic_map(name), symmetric=False)
        for name in ("dynamic", "dynamic_symmetric")
    },
    **{name: Format(in_4_bits(name), four_bit_map(name), symmetric=name == "fp4") for name in ("nf4", "fp4")},
}


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """(M, COLUMNS) float32: rows of different magnitudes, some values zero."""
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    rows = draw(st.integers(1, 20))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0]))
    x = torch.randn(rows, COLUMNS) * torch.exp(spread * torch.randn(rows, 1))
    return x * (torch.rand(rows, COLUMNS) > draw(st.sampled_from([0.0, 0.5, 0.95])))


def promised(test: Callable[[Format, Tensor], None]) -> Callable[[str], None]:
    """A test of all formats on drawn matrices."""

    @pytest.mark.parametrize("name", FORMATS)
    def of_all(name: str) -> None:
        every_run_the_same(given(matrices())(lambda x: test(FORMATS[name], x)))()

    return of_all


@promised
def test_zeros_are_read_back_as_zeros(of: Format, x: Tensor) -> None:
    back, scale = of.quantize(x)
    assert (back[x == 0] == 0).all()
    back, scale = of.quantize(torch.zeros_like(x))
    assert not back.any()
    assert not scale.any()


@promised
def test_no_other_code_is_nearer(of: Format, x: Tensor) -> None:
    back, scale = of.quantize(x)
    possible = of.values.double() * scale.double()[..., None]  # [M or 1, COLUMNS or 1, codes]
    nearest = (x.double()[..., None] - possible).abs().amin(dim=-1)
    # On its way x / scale is rounded two or three times, and the product on the way back once.
    slack = 4 * 2.0**-24 * (x.abs() + back.abs())
    assert ((back.double() - x.double()).abs() <= nearest + slack).all()


@promised
def test_a_power_of_two_moves_to_the_scale(of: Format, x: Tensor) -> None:
    back, scale = of.quantize(x)
    for exponent in (-30, 1, 20):
        larger, its_scale = of.quantize(x * 2.0**exponent)
        assert torch.equal(larger, back * 2.0**exponent)
        assert torch.equal(its_scale, scale * 2.0**exponent)


@promised
def test_rows_in_another_order_are_the_same_rows(of: Format, x: Tensor) -> None:
    order = torch.randperm(len(x))
    assert torch.equal(of.quantize(x[order])[0], of.quantize(x)[0][order])


@promised
def test_the_sign_goes_through_where_the_values_are_symmetric(of: Format, x: Tensor) -> None:
    if of.symmetric:
        assert torch.equal(of.quantize(-x)[0], -of.quantize(x)[0])


@promised
def test_what_is_larger_is_not_read_back_as_smaller(of: Format, x: Tensor) -> None:
    back, _ = of.quantize(x[:1])
    assert (back[0, x[0].argsort()].diff() >= 0).all()


@every_run_the_same
@given(matrices(), st.sampled_from([torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]))
def test_transposed_forms_quantise_the_transpose(x: Tensor, dtype: torch.dtype) -> None:
    codes, scale = quantize_rowwise(x.t(), dtype)
    for got in (quantize_columnwise_transposed(x, dtype), tuple(part.t() for part in quantize_columnwise(x, dtype))):
        assert torch.equal(got[0].float(), codes.float())
        assert torch.equal(got[1], scale)
    codes, scale = quantize_tensorwise(x, dtype)
    transposed, its_scale = quantize_tensorwise_transposed(x, dtype)
    assert torch.equal(transposed.float(), codes.t().float())
    assert torch.equal(its_scale, scale)
