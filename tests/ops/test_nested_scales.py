"""Double quantisation: what it guarantees about values, launches and interchange with bitsandbytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lq_kernels import blockwise_4bit, nested_scales, ordered_mean
from lq_kernels.blockwise import quantize_blockwise
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.codebooks import dynamic_map
from lq_kernels.nested_scales import (
    dequantize_4bit_double,
    dequantize_4bit_double_out,
    dequantize_scales,
    quantize_4bit_double,
    quantize_scales,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def round_trip(x: Tensor, block_size: int = 64, quant_type: str = "nf4") -> Tensor:
    return dequantize_4bit_double(
        *quantize_4bit_double(x, block_size, quant_type), block_size, quant_type, list(x.shape), x.dtype
    )


@pytest.mark.parametrize("size", [1, 2, 37, 1000, 70_000])
def test_the_offset_is_the_mean(size: int) -> None:
    scale = torch.rand(size) + 0.5
    _, _, offset = quantize_scales(scale)
    exact = scale.double().mean()
    # Each of at most 18 sums and the division round once.
    assert abs(offset.double() - exact) <= 19 * 2.0**-24 * exact


def test_lanes_are_added_in_ascending_order_and_then_by_neighbours() -> None:
    lanes = ordered_mean.LANES
    x = torch.rand(lanes + 5)
    x[0], x[lanes] = 2.0**24, 1.0
    first, *others = [x[lane] + x[lane + lanes] if lane < 5 else x[lane] for lane in range(8)]
    expected = ((first + others[0]) + (others[1] + others[2])) + ((others[3] + others[4]) + (others[5] + others[6]))
    x[8:lanes] = 0
    assert ordered_mean.ordered_mean(x) == expected / torch.tensor(float(lanes + 5))


def test_scales_are_those_of_eight_bit_blockwise_quantisation() -> None:
    """Up to the rounding of v, which moves a code by one where v is at a bound."""
    scale = torch.randn(5003).abs() + 0.1
    codes, nested_scale, offset = quantize_scales(scale)
    expected, expected_scale = quantize_blockwise(scale - offset, dynamic_map("dynamic"), 256)
    assert torch.equal(nested_scale, expected_scale)
    assert (codes != expected).sum() < 5
    assert ((codes.int() - expected.int()).abs() <= 1).all()


def test_scales_come_back_with_a_small_error() -> None:
    """For a normal weight: 0.16 % on average and 0.7 % at most, measured on bitsandbytes."""
    _, scale = quantize_4bit(torch.randn(1 << 20))
    error = (dequantize_scales(*quantize_scales(scale)) / scale - 1).abs()
    assert error.mean() < 0.002
    assert error.max() < 0.01


@pytest.mark.parametrize(("quant_type", "block_size"), [("nf4", 64), ("fp4", 64), ("fp4", 128)])
def test_errors_are_as_small_as_published(quant_type: str, block_size: int) -> None:
    x = torch.randn(1 << 20)
    error = (round_trip(x, block_size, quant_type) - x).abs()
    assert error.mean() < 0.11
    assert (error / (x.abs() + 1e-8)).mean() < 0.28


def test_it_is_four_bits_with_scales_in_eight() -> None:
    x = torch.randn(37, 331)
    packed, codes, nested_scale, offset = quantize_4bit_double(x, 32, "fp4", torch.uint8)
    plain, scale = quantize_4bit(x, 32, "fp4")
    assert torch.equal(packed, plain)
    assert all(map(torch.equal, (codes, nested_scale, offset), quantize_scales(scale)))
    scale = dequantize_scales(codes, nested_scale, offset)
    back = dequantize_4bit_double(packed, codes, nested_scale, offset, 32, "fp4", [37, 331], torch.float16)
    assert torch.equal(back, dequantize_4bit(packed, scale, 32, "fp4", [37, 331], torch.float16))
    out = torch.empty(37, 331, dtype=torch.float16)
    dequantize_4bit_double_out(packed, codes, nested_scale, offset, 32, "fp4", out)
    assert torch.equal(out, back)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_scales_that_are_all_alike_come_back_exactly(value: float) -> None:
    x = torch.full((1000,), value)
    codes, nested_scale, offset = quantize_scales(x)
    assert (codes == 127).all()
    assert (nested_scale == 0).all()
    assert torch.equal(dequantize_scales(codes, nested_scale, offset), x)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_everywhere(poison: float) -> None:
    x = torch.randn(100, 64)
    x[1, 7] = poison
    assert not round_trip(x).isfinite().any()


def test_nothing_gives_nothing() -> None:
    packed, codes, nested_scale, offset = quantize_4bit_double(torch.empty(0, 5))
    assert (packed.shape, codes.shape, nested_scale.shape, offset.item()) == ((0, 1), (0,), (0,), 0)
    assert dequantize_4bit_double(packed, codes, nested_scale, offset, 64, "nf4", [0, 5], torch.float32).shape == (0, 5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_is_read_and_the_other_way_round(quant_type: str) -> None:
    bnb = pytest.importorskip("bitsandbytes").functional
    x = torch.randn(64, 1000)
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type=quant_type, compress_statistics=True)
    # Its map is rounded more than once: 1.2e-7 of the largest d, which is less than the largest scale.
    tolerance = 1e-6 * float(x.abs().max())
    theirs = state.absmax, state.state2.absmax, state.offset
    read = dequantize_4bit_double(packed, *theirs, 64, quant_type, [64, 1000], torch.float32)
    torch.testing.assert_close(read, bnb.dequantize_4bit(packed, state), rtol=0, atol=tolerance)

    packed, codes, nested_scale, offset = quantize_4bit_double(x, 64, quant_type)
    torch.testing.assert_close(offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(nested_scale, state.state2.absmax, rtol=1e-5, atol=0)
    # bitsandbytes' CPU code looks codes up on a uniform grid of 2^16 points: near zero they are up to three off.
    assert ((codes.int() - state.absmax.int()).abs() <= 3).all()
    state.absmax, state.state2.absmax, state.offset = codes, nested_scale, offset
    ours = dequantize_4bit_double(packed, codes, nested_scale, offset, 64, quant_type, [64, 1000], torch.float32)
    torch.testing.assert_close(bnb.dequantize_4bit(packed, state), ours, rtol=0, atol=tolerance)


def test_kernels_write_nothing_beside_their_outputs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    buffers: list[Tensor] = []

    def within(values: Tensor) -> Tensor:
        """Room for `values` in the middle of a buffer of sevens."""
        buffers.append(torch.full((values.numel() + 64,), 7, dtype=values.dtype, device=device))
        return buffers[-1][32:-32].view(values.shape)

    scale = torch.rand(5003) + 0.5
    expected = quantize_scales(scale)
    monkeypatch.setattr(nested_scales, "_quantize_scales_fake", lambda scale: tuple(map(within, expected)))
    monkeypatch.setattr(nested_scales, "_dequantize_scales_fake", lambda *nested: within(scale))
    quantize: Any = quantize_scales.launcher
    dequantize: Any = dequantize_scales.launcher
    got = quantize(scale.to(device))
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, expected, strict=True))
    assert torch.equal(dequantize(*got).cpu(), dequantize_scales(*expected))
    assert all((torch.cat([buffer[:32], buffer[-32:]]) == 7).all() for buffer in buffers)


class Launches(TorchDispatchMode):
    """Counts kernels: Triton's, which it takes the place of, and every torch op that starts one."""

    # Allocations without values and views.
    FREE = ("new_empty", "empty", "empty_like", "view", "detach", "alias", "_unsafe_view", "reshape")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: Any) -> Callable[..., None]:
                return lambda *args, **kwargs: self.names.append(name)

        return Kernel()


def test_three_launches_quantise_and_one_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    x = torch.empty(64, 4096, device="meta", dtype=torch.bfloat16)
    nested_scales._map(x.device)
    blockwise_4bit.encode_table("nf4", x.device)
    blockwise_4bit.decode_table("nf4", x.device)
    launches = Launches()
    for module in (blockwise_4bit, nested_scales, ordered_mean):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, launches.kernel(name))
    quantize: Any = quantize_4bit_double.launcher
    dequantize: Any = dequantize_4bit_double.launcher
    with launches:
        packed, *nested = quantize(x, 64, "nf4", torch.uint8)
    assert launches.names == ["_quantize_4bit_kernel", "_sum_lanes_kernel", "_quantize_scales_kernel"]
    launches.names.clear()
    with launches:
        dequantize(packed, *nested, 64, "nf4", [64, 4096], torch.bfloat16)
    assert launches.names == ["_dequantize_4bit_kernel"]


def test_wrong_arguments_say_what_was_expected() -> None:
    packed, codes, nested_scale, offset = quantize_4bit_double(torch.randn(1000), 32)
    with pytest.raises(ValueError, match=r"float32 of one dimension, got torch.float64"):
        quantize_scales(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scale_codes of 32 blocks must be torch.uint8 \(32,\), got torch.float32"):
        dequantize_scales(codes.float(), nested_scale, offset)
    with pytest.raises(ValueError, match=r"nested_scale of 32 blocks must be torch.float32 \(1,\), got .* \(2,\)"):
        dequantize_scales(codes, torch.ones(2), offset)
    with pytest.raises(ValueError, match=r"offset of 32 blocks must be torch.float32 \(\), got .* \(1,\)"):
        dequantize_scales(codes, nested_scale, offset.view(1))
    with pytest.raises(ValueError, match=r"scale_codes of 16 blocks .* another block size"):
        dequantize_4bit_double(packed, codes, nested_scale, offset, 64, "nf4", [1000], torch.float32)
    with pytest.raises(ValueError, match="1002 values take 501 bytes"):
        dequantize_4bit_double(packed, codes, nested_scale, offset, 32, "nf4", [1002], torch.float32)
    with pytest.raises(ValueError, match="out is written in place"):
        dequantize_4bit_double_out(packed, codes, nested_scale, offset, 32, "nf4", torch.empty(10, 100).t())
