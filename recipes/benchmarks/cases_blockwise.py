"""Q1, 8-bit blockwise, and Q2, 4-bit with and without double quantisation: there and back."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lq_kernels.blockwise import BLOCK_SIZE, dequantize_blockwise, quantize_blockwise
from lq_kernels.blockwise_4bit import dequantize_4bit, quantize_4bit
from lq_kernels.codebooks import dynamic_map
from lq_kernels.nested_scales import dequantize_4bit_double, dequantize_scales, quantize_4bit_double, quantize_scales
from torch import Tensor

from lq_plugin.recipes.benchmarks import peers
from lq_plugin.recipes.benchmarks.cases import Case, Inputs, Outputs, assert_equal, ends, normal

BLOCK_4BIT = 64


def blockwise_cases(device: torch.device, rows: int, columns: int) -> Iterator[Case]:
    """On a bfloat16 matrix whose rows are whole blocks."""
    yield _quantize_8bit(device, rows, columns)
    yield _dequantize_8bit(device, rows, columns)
    for double in (False, True):
        yield _quantize_4bit(device, rows, columns, double)
        yield _dequantize_4bit(device, rows, columns, double)


def of_rows(blocks: Tensor, rows: int, some: slice) -> Tensor:
    """What belongs to some rows, of a tensor in the order of rows; on the CPU."""
    return blocks.view(rows, -1)[some].cpu()


def _quantize_8bit(device: torch.device, rows: int, columns: int) -> Case:
    code = dynamic_map("dynamic_symmetric").to(device)

    def check(inputs: Inputs, outputs: Outputs) -> None:
        for some in ends(rows):
            codes, scale = quantize_blockwise.reference(of_rows(inputs[0], rows, some), code.cpu())
            assert_equal(of_rows(outputs[0], rows, some), codes)
            assert_equal(of_rows(outputs[1], rows, some), scale.view(len(codes), -1))

    return Case(
        name="Q1",
        op="quantize_blockwise",
        shape=f"{rows} x {columns} / {BLOCK_SIZE}",
        dtype="bf16 to uint8",
        make=lambda: (normal(device, rows, columns),),
        ours=lambda x: quantize_blockwise(x, code),
        check=check,
        bytes=3 * rows * columns + 4 * rows * columns // BLOCK_SIZE,
        peers=peers.bitsandbytes(partial(peers.quantize_blockwise, code=code, block_size=BLOCK_SIZE)),
    )


def _dequantize_8bit(device: torch.device, rows: int, columns: int) -> Case:
    code, blocks = dynamic_map("dynamic_symmetric").to(device), rows * columns // BLOCK_SIZE

    def make() -> Inputs:
        return torch.randint(256, (rows, columns), dtype=torch.uint8, device=device), torch.rand(blocks, device=device)

    def check(inputs: Inputs, x: Outputs) -> None:
        for some in ends(rows):
            codes, scale = (of_rows(stored, rows, some) for stored in inputs)
            expected = dequantize_blockwise.reference(codes, scale.reshape(-1), code.cpu(), BLOCK_SIZE, torch.bfloat16)
            assert_equal(x[some], expected)

    return Case(
        name="Q1",
        op="dequantize_blockwise",
        shape=f"{rows} x {columns} / {BLOCK_SIZE}",
        dtype="uint8 to bf16",
        make=make,
        ours=lambda codes, scale: dequantize_blockwise(codes, scale, code, BLOCK_SIZE, torch.bfloat16),
        check=check,
        bytes=3 * rows * columns + 4 * blocks,
        peers=peers.bitsandbytes(partial(peers.dequantize_blockwise, code=code, block_size=BLOCK_SIZE)),
    )


def _bytes_4bit(values: int, double: bool) -> int:
    return values * 5 // 2 + values // BLOCK_4BIT * (1 if double else 4)


def _quantize_4bit(device: torch.device, rows: int, columns: int, double: bool) -> Case:
    def check(inputs: Inputs, outputs: Outputs) -> None:
        packed, *scales = outputs
        for some in ends(rows):
            few, scale = quantize_4bit.reference(of_rows(inputs[0], rows, some), BLOCK_4BIT)
            assert_equal(of_rows(packed, rows, some).reshape(-1, 1), few)
            if not double:
                assert_equal(of_rows(scales[0], rows, some).reshape(-1), scale)
        if double:  # the offset is a mean over all scales, so all of them are quantised again
            expected = quantize_scales.reference(quantize_4bit(inputs[0], BLOCK_4BIT)[1].cpu())
            for got, reference in zip(scales, expected, strict=True):
                assert_equal(got, reference)

    quantize: Callable[..., Outputs] = quantize_4bit_double if double else quantize_4bit
    return Case(
        name="Q2",
        op="quantize_4bit_double" if double else "quantize_4bit",
        shape=f"{rows} x {columns} / {BLOCK_4BIT}",
        dtype="bf16 to nf4",
        make=lambda: (normal(device, rows, columns),),
        ours=lambda x: quantize(x, BLOCK_4BIT),
        check=check,
        bytes=_bytes_4bit(rows * columns, double),
        peers=peers.bitsandbytes(partial(peers.quantize_nf4, block_size=BLOCK_4BIT, double=double)),
    )


def _dequantize_4bit(device: torch.device, rows: int, columns: int, double: bool) -> Case:
    quantize: Callable[..., Inputs] = quantize_4bit_double if double else quantize_4bit
    dequantize: Callable[..., Outputs] = dequantize_4bit_double if double else dequantize_4bit
    how = (BLOCK_4BIT, "nf4", [rows, columns], torch.bfloat16)

    def check(inputs: Inputs, x: Outputs) -> None:
        scale = dequantize_scales.reference(*(stored.cpu() for stored in inputs[1:])) if double else inputs[1]
        for some in ends(rows):
            packed, of_some = of_rows(inputs[0], rows, some), of_rows(scale, rows, some).reshape(-1)
            shape = [len(packed), columns]
            assert_equal(x[some], dequantize_4bit.reference(packed, of_some, BLOCK_4BIT, "nf4", shape, torch.bfloat16))

    return Case(
        name="Q2",
        op="dequantize_4bit_double" if double else "dequantize_4bit",
        shape=f"{rows} x {columns} / {BLOCK_4BIT}",
        dtype="nf4 to bf16",
        make=lambda: quantize(normal(device, rows, columns), BLOCK_4BIT),
        ours=lambda *stored: dequantize(*stored, *how),
        check=check,
        bytes=_bytes_4bit(rows * columns, double),
        peers=peers.bitsandbytes(peers.dequantize_nf4(BLOCK_4BIT, [rows, columns])),
    )
