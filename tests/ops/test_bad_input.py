"""What is refused, with which error, and what comes out of inputs that are odd but defined: one table of each."""

from collections.abc import Callable
from typing import Any

import lq_kernels
import pytest
import torch
from lq_kernels import functional as F
from lq_kernels._op import Op
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise, quantize_blockwise_out
from lq_kernels.blockwise import dequantize_blockwise_out as dequantize_out
from lq_kernels.blockwise_4bit import dequantize_4bit, dequantize_4bit_out, quantize_4bit, quantize_4bit_out
from lq_kernels.codebooks import dynamic_map
from lq_kernels.double_quantize import double_quantize
from lq_kernels.fake_quantize import fake_quantize_blockwise, fake_quantize_tensorwise
from lq_kernels.gradient_percentile import record_gradient_norm
from lq_kernels.mixed_scaled_mm import mixed_scaled_mm
from lq_kernels.nearest import dequantize_values, quantize_values, quantize_values_out
from lq_kernels.nested_scales import dequantize_4bit_double, dequantize_scales, quantize_4bit_double, quantize_scales
from lq_kernels.outliers import quantize_rowwise_outliers
from lq_kernels.rescale_int32 import rescale_int32
from lq_kernels.rowwise import (
    quantize_columnwise,
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from lq_kernels.scaled_mm import int8_mm, scaled_mm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NAN, INF = torch.nan, torch.inf

X = torch.randn(6, 130, generator=torch.Generator().manual_seed(0))
W = torch.randn(37, 130, generator=torch.Generator().manual_seed(1))
MAP = dynamic_map("dynamic")
CODES, STATE = F.quantize_blockwise(X, blocksize=64)  # 780 values in 13 blocks
PACKED, STATE4 = F.quantize_nf4(W)  # 4810 values in 76 blocks
DOUBLE, NESTED = F.quantize_nf4(W, compress_statistics=True)
A8, A_STATS, _ = F.int8_vectorwise_quant(X)
W8, W_STATS, _ = F.int8_vectorwise_quant(W)
SCALE_A, SCALE_W = A_STATS[:, None] / 127, W_STATS[:, None] / 127
TOTAL = F.int8_linear_matmul(A8, W8)
COLUMNS, COUNT = torch.full((130,), 130, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

U8 = torch.uint8


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=U8)


def mixed(**changes: Any) -> tuple[Any, ...]:
    arguments = {
        "x": X, "codes": A8, "scale": SCALE_A, "weight_codes": W8, "weight_scale": SCALE_W,
        "columns": COLUMNS, "count": COUNT, "bias": None, "out_dtype": torch.float32,
    }  # fmt: skip
    return tuple((arguments | changes).values())


# op, arguments, error, a phrase of its message
OPS: dict[str, tuple[Op[..., Any], tuple[Any, ...], type[Exception], str]] = {
    "values of integers": (quantize_values, (CODES, MAP), TypeError, "got torch.uint8"),
    "values of doubles": (quantize_values, (X.double(), MAP), TypeError, "got torch.float64"),
    "values with a short map": (quantize_values, (X, MAP[:16]), ValueError, "a code book is"),
    "values with a map of halves": (quantize_values, (X, MAP.half()), ValueError, "a code book is"),
    "values with a map elsewhere": (quantize_values, (X, MAP.to("meta")), ValueError, "the code book is on meta"),
    "codes that are signed": (dequantize_values, (A8, MAP), TypeError, "takes uint8"),
    "codes to integers": (dequantize_values, (CODES, MAP, torch.int32), TypeError, "to torch.int32"),
    "values into a transposed tensor": (
        quantize_values_out, (X, MAP, bytes_of(130, 6).t()), ValueError, "contiguous"),
    "values into a wrong shape": (quantize_values_out, (X, MAP, bytes_of(6, 131)), ValueError, "codes must be"),
    "values into a wrong dtype": (quantize_values_out, (X, MAP, A8.clone()), ValueError, "codes must be"),
    "blocks of integers": (quantize_blockwise, (A8, MAP), TypeError, "got torch.int8"),
    "blocks of no size": (quantize_blockwise, (X, MAP, 0), ValueError, "block_size must be positive, got 0"),
    "blocks of a negative size": (quantize_blockwise, (X, MAP, -64), ValueError, "block_size must be positive"),
    "blocks with a map of two rows": (quantize_blockwise, (X, MAP.view(2, 128)), ValueError, "a code book is"),
    "blocks into a short scale": (
        quantize_blockwise_out, (X, MAP, 64, bytes_of(6, 130), torch.empty(12)), ValueError, "scale must be"),
    "blocks into a scale with gaps": (
        quantize_blockwise_out, (X, MAP, 64, bytes_of(6, 130), torch.empty(26)[::2]), ValueError, "contiguous"),
    "blocks read with a short scale": (
        dequantize_blockwise, (CODES, STATE.absmax[1:], MAP, 64), ValueError, "of shape (13,)"),
    "blocks read with a long scale": (
        dequantize_blockwise, (CODES, STATE.absmax, MAP, 128), ValueError, "of shape (7,)"),
    "blocks read with a scale of halves": (
        dequantize_blockwise, (CODES, STATE.absmax.half(), MAP, 64), ValueError, "float32 scale"),
    "blocks read as doubles": (
        dequantize_blockwise, (CODES, STATE.absmax, MAP, 64, torch.float64), TypeError, "to torch.float64"),
    "blocks read into a transposed tensor": (
        dequantize_out, (CODES, STATE.absmax, MAP, 64, torch.empty(130, 6).t()), ValueError, "contiguous"),
    "4 bits of integers": (quantize_4bit, (A8,), ValueError, "got torch.int8"),
    "4 bits in blocks of 48": (quantize_4bit, (X, 48), ValueError, "block_size must be one of"),
    "4 bits in blocks of 8192": (quantize_4bit, (X, 8192), ValueError, "block_size must be one of"),
    "4 bits of another type": (quantize_4bit, (X, 64, "int4"), ValueError, "quant_type must be one of"),
    "4 bits that fill no float": (quantize_4bit, (X[0, :5], 64, "nf4", torch.float32), RuntimeError, "use uint8"),
    "4 bits into too few bytes": (
        quantize_4bit_out, (W, 64, "nf4", bytes_of(2404), torch.empty(76)), ValueError, "2405 bytes"),
    "4 bits into bytes with gaps": (
        quantize_4bit_out, (W, 64, "nf4", bytes_of(4810)[::2], torch.empty(76)), ValueError, "contiguous"),
    "4 bits into a short scale": (
        quantize_4bit_out, (W, 64, "nf4", bytes_of(2405), torch.empty(75)), ValueError, "float32"),
    "4 bits read in another shape": (
        dequantize_4bit, (PACKED, STATE4.absmax, 64, "nf4", [37, 131], torch.float32), ValueError, "bytes"),
    "4 bits read with another block size": (
        dequantize_4bit, (PACKED, STATE4.absmax, 128, "nf4", [37, 130], torch.float32), ValueError, "(38,)"),
    "4 bits read as integers": (
        dequantize_4bit, (PACKED, STATE4.absmax, 64, "nf4", [37, 130], torch.int8), ValueError, "torch.int8"),
    "4 bits read into a transposed tensor": (
        dequantize_4bit_out, (PACKED, STATE4.absmax, 64, "nf4", torch.empty(130, 37).t()), ValueError, "contiguous"),
    "4 bits with scales in 8 bits, of integers": (quantize_4bit_double, (A8,), ValueError, "got torch.int8"),
    "4 bits read with half of the nested scales": (
        dequantize_4bit_double,
        (DOUBLE, NESTED.absmax, NESTED.state2.absmax[:0], NESTED.offset, 64, "nf4", [37, 130], torch.float32),
        ValueError, "nested_scale of 76 blocks"),
    "scales of halves": (quantize_scales, (STATE4.absmax.half(),), ValueError, "float32 of one dimension"),
    "scales with a vector as offset": (
        dequantize_scales, (NESTED.absmax, NESTED.state2.absmax, torch.zeros(1)), ValueError, "offset"),
    "rows of a vector": (quantize_rowwise, (X[0],), ValueError, "takes a matrix"),
    "rows of integers": (quantize_rowwise, (A8,), TypeError, "cast it"),
    "rows to 4 bits": (quantize_rowwise, (X, torch.uint8), TypeError, "returns codes of"),
    "rows rounded somehow": (quantize_rowwise, (X, torch.int8, "up"), ValueError, "'nearest' or 'stochastic'"),
    "rows rounded at random without a seed": (
        quantize_rowwise, (X, torch.int8, "stochastic"), ValueError, "takes a seed"),
    "rows with two seeds": (
        quantize_rowwise, (X, torch.int8, "stochastic", torch.zeros(2, dtype=torch.int64)), ValueError, "one int64"),
    "columns of three dimensions": (quantize_columnwise, (X[None],), ValueError, "takes a matrix"),
    "columns of booleans": (quantize_columnwise_transposed, (X > 0,), TypeError, "got torch.bool"),
    "a tensor of doubles": (quantize_tensorwise, (X.double(),), TypeError, "got torch.float64"),
    "a tensor of complex numbers": (
        quantize_tensorwise_transposed, (X.to(torch.complex64),), TypeError, "got torch.complex64"),
    "outliers above nothing": (quantize_rowwise_outliers, (X, 0.0), ValueError, "a threshold above 0"),
    "outliers above NaN": (quantize_rowwise_outliers, (X, NAN), ValueError, "a threshold above 0"),
    "outliers of a vector": (double_quantize, (X[0], 6.0), ValueError, "takes a matrix"),
    "a product of K and K + 1": (int8_mm, (A8, W8.t()[1:]), ValueError, "got (6, 130) and (129, 37)"),
    "a product of floats": (int8_mm, (X, W.t()), TypeError, "int8"),
    "a scaled product of floats and codes": (
        scaled_mm, (X, W8.t(), SCALE_A, SCALE_W.t(), None, torch.float32), TypeError, "torch.float32"),
    "a scaled product with a row of scales": (
        scaled_mm, (A8, W8.t(), A_STATS, SCALE_W.t(), None, torch.float32), ValueError, "scale_a"),
    "a scaled product with a short bias": (
        scaled_mm, (A8, W8.t(), SCALE_A, SCALE_W.t(), torch.zeros(36), torch.float32), ValueError, "bias"),
    "a scaled product with a bias elsewhere": (
        scaled_mm, (A8, W8.t(), SCALE_A, SCALE_W.t(), torch.zeros(37, device="meta"), torch.float32),
        ValueError, "one device"),
    "a scaled product to integers": (
        scaled_mm, (A8, W8.t(), SCALE_A, SCALE_W.t(), None, torch.int32), TypeError, "not torch.int32"),
    "a scaled product of too many": (
        scaled_mm,
        (torch.zeros(1, 140000, dtype=torch.int8), torch.zeros(140000, 1, dtype=torch.int8),
         torch.ones(1, 1), torch.ones(1, 1), None, torch.float32),
        ValueError, "split K"),
    "a mixed product of other codes": (mixed_scaled_mm, mixed(codes=A8[1:]), ValueError, "takes x and codes"),
    "a mixed product with int64 columns": (mixed_scaled_mm, mixed(columns=COLUMNS.long()), ValueError, "columns"),
    "a mixed product with a number as count": (mixed_scaled_mm, mixed(count=COUNT[0]), ValueError, "count"),
    "a mixed product elsewhere": (mixed_scaled_mm, mixed(scale=SCALE_A.to("meta")), ValueError, "one device"),
    "sums of floats": (rescale_int32, (X, SCALE_A, SCALE_A.t(), None, torch.float32), ValueError, "int32"),
    "sums with the scales of others": (
        rescale_int32, (TOTAL, SCALE_W, SCALE_W.t(), None, torch.float32), ValueError, "row_scale"),
    "simulated blocks that are too long": (fake_quantize_blockwise, (X, MAP, 8192, 780), ValueError, "blocks of 1 to"),
    "simulated blocks in rows that do not fit": (
        fake_quantize_blockwise, (X, MAP, 64, 131), ValueError, "into rows of 131"),
    "a simulated tensor of integers": (fake_quantize_tensorwise, (A8, MAP), TypeError, "got torch.int8"),
    "a history of 99 norms": (
        record_gradient_norm, (X, torch.zeros(99), torch.empty(3), 1, 5), ValueError, "gnorm_vec"),
    "a step of 0": (record_gradient_norm, (X, torch.zeros(100), torch.empty(3), 0, 5), ValueError, "from 1"),
    "a percentile of 100": (
        record_gradient_norm, (X, torch.zeros(100), torch.empty(3), 1, 100), ValueError, "percentile must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPS)
def test_an_op_refuses_it_in_reference_launcher_and_fake(case: str) -> None:
    op, args, error, phrase = OPS[case]
    with pytest.raises(error, match=matched(phrase)):
        op(*args)
    assert op.launcher is not None
    with pytest.raises(error, match=matched(phrase)):
        op.launcher(*args)
    with FakeTensorMode() as mode, pytest.raises(error, match=matched(phrase)):
        op(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))


def matched(phrase: str) -> str:
    return phrase.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+")


def elsewhere(state: F.QuantState) -> F.QuantState:
    return F.QuantState.from_dict(state.as_dict(), "meta")


def lonely_codes() -> lq_kernels.MatmulLtState:
    return lq_kernels.MatmulLtState(CB=W8, has_fp16_weights=False)


# call, error, a phrase of its message
FUNCTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "blocks of integers": (lambda: F.quantize_blockwise(A8), ValueError, "got torch.int8"),
    "blocks of doubles": (lambda: F.quantize_blockwise(X.double()), ValueError, "got torch.float64"),
    "blocks of no size": (lambda: F.quantize_blockwise(X, blocksize=0), ValueError, "positive"),
    "blocks of no size into out": (
        lambda: F.quantize_blockwise(X, out=bytes_of(6, 130), blocksize=-1), ValueError, "positive"),
    "a short map": (lambda: F.quantize_blockwise(X, MAP[:16]), ValueError, "a code book is"),
    "a map that does not ascend": (lambda: F.quantize_blockwise(X, MAP.flip(0)), ValueError, "ascends"),
    "out of another shape": (lambda: F.quantize_blockwise(X, out=bytes_of(6, 99)), ValueError, "codes must be"),
    "out of another dtype": (lambda: F.quantize_blockwise(X, out=torch.empty(6, 130)), ValueError, "codes must be"),
    "out with gaps": (lambda: F.quantize_blockwise(X, out=bytes_of(6, 260)[:, ::2]), ValueError, "contiguous"),
    "out elsewhere": (
        lambda: F.quantize_blockwise(X, out=bytes_of(6, 130).to("meta")), ValueError, "out is on meta"),
    "absmax of another length": (
        lambda: F.quantize_blockwise(X, absmax=torch.empty(3), blocksize=64), ValueError, "scale must be"),
    "reading without a state": (lambda: F.dequantize_blockwise(CODES), ValueError, "needs quant_state or absmax"),
    "reading floats": (lambda: F.dequantize_blockwise(X, STATE), ValueError, "A must be torch.uint8"),
    "reading codes of another size": (
        lambda: F.dequantize_blockwise(CODES[:3], STATE), ValueError, "of shape (7,)"),
    "reading with absmax and another blocksize": (
        lambda: F.dequantize_blockwise(CODES, absmax=STATE.absmax), ValueError, "of shape (1,)"),
    "reading with a state elsewhere": (
        lambda: F.dequantize_blockwise(CODES, elsewhere(STATE)), ValueError, "is on meta"),
    "reading into halves": (
        lambda: F.dequantize_blockwise(CODES, STATE, out=torch.empty(6, 130).half()), ValueError, "out must be"),
    "reading into another shape": (
        lambda: F.dequantize_blockwise(CODES, STATE, out=torch.empty(6, 13)), ValueError, "out must be"),
    "a tensor of integers": (lambda: F.quantize(A8), ValueError, "quantize takes float32"),
    "a tensor's codes without absmax": (lambda: F.dequantize(CODES), ValueError, "needs state or absmax"),
    "values of integers": (lambda: F.quantize_no_absmax(A8, MAP), ValueError, "got torch.int8"),
    "codes of floats": (lambda: F.dequantize_no_absmax(X, MAP), ValueError, "A must be torch.uint8"),
    "reading with half of a nested state": (
        lambda: F.dequantize_blockwise(CODES, F.QuantState(CODES[0, :13], blocksize=64, dtype=X.dtype, state2=STATE)),
        ValueError, "needs offset"),
    "reading with a state of no dtype": (
        lambda: F.dequantize_blockwise(CODES, F.QuantState(STATE.absmax, blocksize=64)), ValueError, "needs blocksize"),
    "4 bits of integers": (lambda: F.quantize_4bit(A8), ValueError, "got torch.int8"),
    "4 bits in blocks of 48": (lambda: F.quantize_4bit(X, blocksize=48), ValueError, "must be one of"),
    "4 bits in blocks of 0": (lambda: F.quantize_4bit(X, blocksize=0), ValueError, "must be one of"),
    "4 bits of another type": (lambda: F.quantize_4bit(X, quant_type="int4"), ValueError, "quant_type must be"),
    "an odd number of bytes as halves": (
        lambda: F.quantize_nf4(W, quant_storage=torch.float16), RuntimeError, "cannot be viewed as torch.float16"),
    "4 bits into another size": (lambda: F.quantize_4bit(W, out=bytes_of(2404, 1)), ValueError, "2405 bytes"),
    "4 bits with absmax of another length": (
        lambda: F.quantize_4bit(W, absmax=torch.empty(75)), ValueError, "float32"),
    "reading 4 bits without a state": (lambda: F.dequantize_4bit(PACKED), ValueError, "needs quant_state, or absmax"),
    "reading 4 bits with absmax alone": (
        lambda: F.dequantize_4bit(PACKED, absmax=STATE4.absmax), ValueError, "needs quant_state, or absmax"),
    "reading 4 bits in blocks of 48": (
        lambda: F.dequantize_4bit(PACKED, absmax=STATE4.absmax, out=W.clone(), blocksize=48), ValueError, "one of"),
    "reading too few bytes": (lambda: F.dequantize_4bit(PACKED[:100], STATE4), ValueError, "2405 bytes"),
    "reading bytes that were cast": (
        lambda: F.dequantize_4bit(F.quantize_nf4(W[:36], quant_storage=torch.bfloat16)[0].float(), STATE4),
        ValueError, "bytes"),
    "reading 4 bits with an 8-bit state": (lambda: F.dequantize_4bit(PACKED, STATE), ValueError, "of 8-bit codes"),
    "reading nf4 as fp4": (lambda: F.dequantize_fp4(PACKED, STATE4), ValueError, "got a state of nf4"),
    "reading 4 bits into another shape": (
        lambda: F.dequantize_4bit(PACKED, STATE4, out=torch.empty(130, 37)), ValueError, "shape of the state"),
    "reading 4 bits into another dtype": (
        lambda: F.dequantize_4bit(PACKED, STATE4, out=W.half()), ValueError, "out must be torch.float32"),
    "reading 4 bits with a state elsewhere": (
        lambda: F.dequantize_4bit(DOUBLE, elsewhere(NESTED)), ValueError, "is on meta"),
    "a 4-bit product without a state": (lambda: F.matmul_4bit(X, PACKED, None), ValueError, "needs quant_state"),
    "a 4-bit product of another K": (
        lambda: F.matmul_4bit(X[:, 1:], PACKED, STATE4), ValueError, "got (6, 129) and (37, 130)"),
    "a 4-bit product of integers": (lambda: F.matmul_4bit(A8, PACKED, STATE4), ValueError, "got torch.int8"),
    "a 4-bit product with a short bias": (
        lambda: F.matmul_4bit(X, PACKED, STATE4, bias=torch.zeros(36)), ValueError, "bias"),
    "a 4-bit product into another shape": (
        lambda: F.matmul_4bit(X, PACKED, STATE4, out=torch.empty(6, 36)), ValueError, "out must be"),
    "a row without a state": (lambda: F.gemv_4bit(X[:1], PACKED), ValueError, "needs state"),
    "two rows as one": (lambda: F.gemv_4bit(X[:2], PACKED, state=STATE4), ValueError, "takes one row"),
    "rows of integers": (lambda: F.int8_vectorwise_quant(A8), ValueError, "got torch.int8"),
    "a negative threshold": (lambda: F.int8_vectorwise_quant(X, -1.0), ValueError, "must not be negative"),
    "a threshold that is NaN": (lambda: F.int8_double_quant(X, threshold=NAN), ValueError, "must not be negative"),
    "double codes into another shape": (
        lambda: F.int8_double_quant(X, out_row=A8[1:].clone()), ValueError, "out_row must be"),
    "maxima of other rows": (lambda: F.int8_vectorwise_dequant(A8, W_STATS), ValueError, "with 6 values"),
    "codes that are floats": (lambda: F.int8_vectorwise_dequant(X, A_STATS), ValueError, "A must be torch.int8"),
    "an int8 product of floats": (lambda: F.int8_linear_matmul(X, W8), ValueError, "A must be torch.int8"),
    "an int8 product of another K": (lambda: F.int8_linear_matmul(A8, W8[:, 1:]), ValueError, "(37, 129)"),
    "an int8 product to halves": (
        lambda: F.int8_linear_matmul(A8, W8, dtype=torch.float16), ValueError, "gives int32"),
    "an int8 product into floats": (
        lambda: F.int8_linear_matmul(A8, W8, out=torch.empty(6, 37)), ValueError, "out must be torch.int32"),
    "values of float sums": (
        lambda: F.int8_mm_dequant(TOTAL.float(), A_STATS, W_STATS), ValueError, "A must be torch.int32"),
    "values with maxima of halves": (
        lambda: F.int8_mm_dequant(TOTAL, A_STATS.half(), W_STATS), ValueError, "row_stats must be float32"),
    "values with maxima of other columns": (
        lambda: F.int8_mm_dequant(TOTAL, A_STATS, A_STATS), ValueError, "col_stats must be float32 with 37"),
    "values into integers": (
        lambda: F.int8_mm_dequant(TOTAL, A_STATS, W_STATS, out=TOTAL.clone()), TypeError, "not torch.int32"),
    "a mixed product of other rows": (
        lambda: F.int8_mixed_scaled_mm(X, A8[1:], W8, A_STATS, W_STATS, COLUMNS[:0]), ValueError, "CA"),
    "a mixed product with the maxima of others": (
        lambda: F.int8_mixed_scaled_mm(X, A8, W8, A_STATS, A_STATS, COLUMNS[:0]), ValueError, "SCB must be"),
    "rows of a vector, SwitchBack": (lambda: F.quantize_rowwise(X[0]), ValueError, "takes a matrix"),
    "a SwitchBack product of floats": (
        lambda: F.int8_matmul_rowwise_dequantize(X, W8.t(), A_STATS, W_STATS, None),
        ValueError, "a must be torch.int8"),
    "a SwitchBack product with a row of maxima for one": (
        lambda: F.int8_matmul_mixed_dequantize(A8, W8.t(), A_STATS, W_STATS, None), ValueError, "with 1 values"),
    "an int8 matmul of another K": (lambda: lq_kernels.matmul(X, W[:, 1:]), ValueError, "got (6, 130) and (37, 129)"),
    "an int8 matmul of integers": (lambda: lq_kernels.matmul(A8, W), TypeError, "got torch.int8"),
    "an int8 matmul with a negative threshold": (
        lambda: lq_kernels.matmul(X, W, threshold=-6.0), ValueError, "must not be negative"),
    "an int8 weight without its codes": (
        lambda: lq_kernels.matmul(X, W8, state=lq_kernels.MatmulLtState(has_fp16_weights=False)),
        ValueError, "needs state.CB"),
    "codes without their maxima": (lambda: lq_kernels.matmul(X, W8, state=lonely_codes()), ValueError,
        "needs state.CB"),
    "a simulated product of another K": (
        lambda: lq_kernels.matmul_fp8_mixed(X, W, MAP, MAP), ValueError, "takes a (..., K)"),
    "a simulated product with a short map": (
        lambda: lq_kernels.matmul_fp8_global(X, W.t(), MAP[:9], MAP), ValueError, "a code book is"),
    "a simulated product in blocks of 0": (
        lambda: lq_kernels.matmul_fp8_mixed(X, W.t(), MAP, MAP, bsz=0), ValueError, "bsz must be"),
    "clipping of integers": (lambda: F.percentile_clipping(A8, torch.zeros(100), 1), ValueError, "got torch.int8"),
    "clipping at step 0": (lambda: F.percentile_clipping(X, torch.zeros(100), 0), ValueError, "from 1"),
    "a map of 9 bits": (lambda: F.create_dynamic_map(total_bits=9), ValueError, "2 to 8 bits"),
    "a float of 9 bits": (lambda: F.create_fp8_map(True, 5, 3), ValueError, "total_bits=8"),
    "a linear map of 1 bit": (lambda: F.create_linear_map(total_bits=1), ValueError, "2 to 8 bits"),
    "a 4-bit map of no op": (lambda: F.get_4bit_type("int4", "cpu"), NotImplementedError, "no op takes 'int4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_refuses_it(case: str) -> None:
    call, error, phrase = FUNCTIONS[case]
    with pytest.raises(error, match=matched(phrase)):
        call()


def test_nothing_was_written_by_what_was_refused() -> None:
    assert torch.equal(F.quantize_blockwise(X, blocksize=64)[0], CODES)
    assert torch.equal(F.quantize_nf4(W)[0], PACKED)
    assert torch.equal(F.int8_vectorwise_quant(X)[0], A8)


def poisoned(value: float) -> Tensor:
    """(4, 64) with one such value in row 1."""
    x = torch.ones(4, 64)
    x[1, 7] = value
    return x


def round_trip_8bit(x: Tensor, **kwargs: Any) -> Tensor:
    return F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=64, **kwargs))


def round_trip_int8(x: Tensor) -> Tensor:
    return F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(x)[:2])


def round_trip_switchback(x: Tensor) -> Tensor:
    return F.dequantize_rowwise(*F.quantize_rowwise(x))


ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bits": round_trip_8bit,
    "8 bits, unsigned": lambda x: round_trip_8bit(x, code=F.create_dynamic_map(signed=False)),
    "nf4": lambda x: F.dequantize_4bit(*F.quantize_nf4(x)),
    "fp4": lambda x: F.dequantize_4bit(*F.quantize_fp4(x)),
    "int8 rows": round_trip_int8,
    "SwitchBack rows": round_trip_switchback,
}
# Those of which a single value that is not finite reaches everything.
ROUND_TRIPS_OF_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bits, nested": lambda x: round_trip_8bit(x, nested=True),
    "nf4, compressed": lambda x: F.dequantize_4bit(*F.quantize_nf4(x, compress_statistics=True)),
    "8 bits, tensorwise": lambda x: F.dequantize(*F.quantize(x)),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_what_is_not_finite_shows_in_its_block_and_in_no_other(name: str, value: float) -> None:
    x = poisoned(value)
    restored = ROUND_TRIPS[name](x.abs() if "unsigned" in name else x)
    assert restored.isnan().all(dim=1).tolist() == [False, True, False, False]
    assert restored.isfinite().all(dim=1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ROUND_TRIPS_OF_TENSORS)
def test_what_is_not_finite_shows_in_all_that_shares_its_statistics(name: str, value: float) -> None:
    assert ROUND_TRIPS_OF_TENSORS[name](poisoned(value)).isnan().all()


@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-40, 2.0**-149])
@pytest.mark.parametrize("name", [*ROUND_TRIPS, *ROUND_TRIPS_OF_TENSORS])
def test_zeros_and_what_is_too_small_to_scale_come_back_as_zeros(name: str, tiny: float) -> None:
    x = torch.full((4, 64), tiny)
    restored = (ROUND_TRIPS | ROUND_TRIPS_OF_TENSORS)[name](x)
    assert (restored == 0).all()


@pytest.mark.parametrize("name", [*ROUND_TRIPS, *ROUND_TRIPS_OF_TENSORS])
def test_zeros_among_ones_stay_zeros(name: str) -> None:
    x = torch.ones(4, 64)
    x[:, ::3] = 0
    assert torch.equal((ROUND_TRIPS | ROUND_TRIPS_OF_TENSORS)[name](x) == 0, x == 0)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
@pytest.mark.parametrize("name", [*ROUND_TRIPS, *ROUND_TRIPS_OF_TENSORS])
def test_nothing_gives_nothing(name: str, shape: tuple[int, int]) -> None:
    assert (ROUND_TRIPS | ROUND_TRIPS_OF_TENSORS)[name](torch.empty(shape)).shape == shape


def test_products_without_rows_columns_or_summands() -> None:
    assert F.int8_linear_matmul(A8[:0], W8).shape == (0, 37)
    assert F.int8_linear_matmul(A8, W8[:0]).shape == (6, 0)
    assert not F.int8_linear_matmul(A8[:, :0], W8[:, :0]).any()
    assert lq_kernels.matmul(X[:0], W, threshold=6.0).shape == (0, 37)
    assert F.matmul_4bit(X[:0], PACKED, STATE4).shape == (0, 37)
    assert lq_kernels.matmul_fp8_global(X[:0], W.t(), MAP, MAP).shape == (0, 37)
