"""8-bit quantisation under bitsandbytes' names: what is returned, kept and written, and how exact it is."""

import pytest
import torch
from hostile import cut_out
from lq_kernels import functional as F
from lq_kernels.codebooks import dynamic_map
from published import errors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_8_bit_errors_are_as_small_as_published(dtype: torch.dtype, blocksize: int, nested: bool) -> None:
    unsigned = F.create_dynamic_map(signed=False)
    for x, code, absolute, relative in (
        (torch.randn(512, 512), None, 0.011, 0.018),
        (torch.rand(512, 512), None, 0.0036, 0.015),
        (torch.rand(512, 512), unsigned, 0.0023, 0.012),
    ):
        x = x.to(dtype)
        codes, state = F.quantize_blockwise(x, code, blocksize=blocksize, nested=nested)
        restored = F.dequantize_blockwise(codes, state)
        assert (restored.dtype, restored.shape) == (dtype, x.shape)
        error = errors(restored, x)
        assert error[0] < absolute
        assert error[1] < relative


@pytest.mark.parametrize("nested", [False, True])
def test_the_state_says_how_to_read_the_codes(nested: bool) -> None:
    x = torch.randn(3, 1000, dtype=torch.bfloat16)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    assert (state.blocksize, state.dtype, state.shape, state.quant_type, state.nested) == (
        64, torch.bfloat16, None, None, nested
    )  # fmt: skip
    absmax = torch.nn.functional.pad(x.float().flatten(), (0, 8)).view(-1, 64).abs().amax(1)
    if nested:
        assert (state.absmax.dtype, len(state.absmax), state.state2.blocksize) == (torch.uint8, 47, 64)
        torch.testing.assert_close(state.offset, absmax.mean())
        inner = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
        torch.testing.assert_close(inner, absmax, rtol=0, atol=0.01 * float(absmax.max()))
    else:
        assert torch.equal(state.absmax, absmax)
    assert torch.equal(
        F.dequantize_blockwise(codes, F.QuantState.from_dict(state.as_dict(), "cpu")).isfinite(), x > -99
    )


@pytest.mark.parametrize("blocksize", [1, 3, 100, 4096, 16384])
def test_any_blocksize_and_any_strides(blocksize: int) -> None:
    x = torch.randn(40, 300)
    codes, state = F.quantize_blockwise(cut_out(x, "columns"), blocksize=blocksize)
    expected, same = F.quantize_blockwise(x, blocksize=blocksize)
    assert torch.equal(codes, expected)
    assert state == same
    assert len(state.absmax) == -(-12000 // blocksize)


def test_without_a_state_the_absmax_is_enough() -> None:
    x = torch.randn(500)
    codes, state = F.quantize_blockwise(x.half(), blocksize=100)
    restored = F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=100)
    assert restored.dtype == torch.float32
    assert torch.equal(restored, dynamic_map("dynamic")[codes.int()] * state.absmax.repeat_interleave(100))
    half = torch.empty(500, dtype=torch.float16)
    assert F.dequantize_blockwise(codes, absmax=state.absmax, blocksize=100, out=half) is half
    assert torch.equal(half, restored.half())


@pytest.mark.parametrize("nested", [False, True])
def test_8_bit_outputs_are_written_where_asked(nested: bool) -> None:
    x = torch.randn(5, 300)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    out, absmax, values = torch.empty(5, 300, dtype=torch.uint8), torch.empty(24), torch.empty(5, 300)
    written, same = F.quantize_blockwise(x, out=out, absmax=absmax, blocksize=64, nested=nested)
    assert written is out
    assert torch.equal(out, codes)
    assert same == state
    assert torch.equal(absmax, F.quantize_blockwise(x, blocksize=64)[1].absmax)
    assert F.dequantize_blockwise(codes, state, out=values) is values
    assert torch.equal(values, F.dequantize_blockwise(codes, state))


def test_a_code_of_another_dtype_is_read_as_float32() -> None:
    x, code = torch.randn(100), torch.linspace(-1, 1, 256).half()
    codes, state = F.quantize_blockwise(x, code)
    assert state.code.dtype == torch.float32
    assert torch.equal(codes, F.quantize_blockwise(x, code.float())[0])


def test_tensorwise_quantisation_is_as_accurate_as_published() -> None:
    for x, bound in ((torch.randn(1024, 1024), 0.0135), (torch.rand(1024, 1024), 0.004)):
        codes, (absmax, code) = F.quantize(x)
        assert absmax == x.abs().max()
        restored = F.dequantize(codes, (absmax, code))
        assert restored.dtype == torch.float32
        assert errors(restored, x)[0] < bound
    torch.testing.assert_close(restored, x, atol=1e-2, rtol=0)
    assert torch.equal(F.dequantize(codes, absmax=absmax), restored)


def test_tensorwise_zeros_halves_and_outputs() -> None:
    for small in (0.0, 1e-40):
        zeros, state = F.quantize(torch.full((3, 7), small))
        assert (zeros == 127).all()
        assert not F.dequantize(zeros, state).any()
    x = torch.randn(5, 70)
    half = F.quantize(x.half())
    assert torch.equal(half[0], F.quantize(x.half().float())[0])
    codes, values = torch.empty(5, 70, dtype=torch.uint8), torch.empty(5, 70)
    out, state = F.quantize(x, out=codes)
    assert out is codes
    assert F.dequantize(codes, state, out=values) is values
    assert torch.equal(values, F.dequantize(*F.quantize(x)))
    assert F.quantize(torch.empty(0, 3))[0].shape == (0, 3)


def test_codes_without_a_scale_are_the_nearest_values() -> None:
    code = F.create_linear_map()
    x = torch.tensor([-5.0, -1.0, -0.0041, 0.0, 0.004, 0.3, 1.0, 2.0])
    codes = F.quantize_no_absmax(x, code)
    assert torch.equal(F.dequantize_no_absmax(codes, code), code[(x[:, None] - code).abs().argmin(dim=1)])
