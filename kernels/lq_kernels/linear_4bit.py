"""The linear layer with a weight in 4 bits for any number of rows, and its gradient: which kernel multiplies what.

    rows            on a GPU
    1 .. 128        small_batch_4bit, where it can read the weight
    1               gemv_4bit otherwise
    more            W is read back in two halves, the second while torch multiplies by the first

On an H200 with torch 2.11, Triton 3.6 and W (14336, 4096) in NF4, microseconds of small_batch_4bit at 8, 16, 32, 64 and
128 rows are 35, 37, 42, 52 and 64; to read W back takes 41 and the bfloat16 product behind it 32 to 34, so that the
fused kernel wins up to 128 rows, and at 256 (155 against 96) it does not.

A range of rows of W fills columns of the output. The gradient to the input sums over the rows of W, in one product.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels.blockwise_4bit import dequantize_4bit, launch_dequantize
from lq_kernels.gemv_4bit import launch_gemv
from lq_kernels.layout_4bit import as_bytes, check_product, rows_of
from lq_kernels.small_batch_4bit import LARGEST_ROWS, fits_small_batch, launch_small_batch, plan_for


@op
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., K) @ W.t() + bias -> (..., N); W of `shape` (N, K) as `quantize_4bit` packed it, read in the dtype of x.

    x is float32, bfloat16 or float16, bias (N,) of the same dtype or None. Any number of rows, 0 included, and any K
    and N. ValueError: sizes that do not fit together.
    """
    _check(x, packed, scale, block_size, quant_type, shape, bias)
    weight = dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@linear_4bit.fake
def _linear_4bit_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    _check(x, packed, scale, block_size, quant_type, shape, bias)
    return x.new_empty(*x.shape[:-1], shape[0])


@op
def linear_4bit_grad_input(
    grad: Tensor, packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int]
) -> Tensor:
    """grad (..., N) @ W -> (..., K); W of `shape` (N, K), read in the dtype of grad. As `linear_4bit` otherwise."""
    _check_grad(grad, packed, scale, block_size, quant_type, shape)
    return grad @ dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, grad.dtype)


@linear_4bit_grad_input.fake
def _linear_4bit_grad_input_fake(
    grad: Tensor, packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int]
) -> Tensor:
    _check_grad(grad, packed, scale, block_size, quant_type, shape)
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None,
) -> None:
    check_product(x, packed, scale, block_size, quant_type, shape, bias)
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"linear_4bit takes a bias of the dtype of x, {x.dtype}, got {bias.dtype}: cast it")


def _check_grad(
    grad: Tensor, packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int]
) -> None:
    if len(shape) != 2 or grad.ndim == 0 or grad.shape[-1] != shape[0]:
        raise ValueError(
            "the gradient of a 4-bit product takes grad (..., N) and W (N, K), "
            f"got {tuple(grad.shape)} and {tuple(shape)}"
        )
    x = grad.new_empty(0, shape[1])
    check_product(x, packed, scale, block_size, quant_type, shape, None)


@linear_4bit.triton
def _launch_linear_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    out = _linear_4bit_fake(x, packed, scale, block_size, quant_type, shape, bias)
    if out.numel() == 0:
        return out
    rows, columns = rows_of(x), rows_of(out)
    M = len(rows)
    if M <= LARGEST_ROWS and fits_small_batch(x, block_size, shape):
        launch_small_batch(rows, packed, scale, block_size, quant_type, columns, bias, *plan_for(M, shape, x.device))
    elif M == 1:
        launch_gemv(rows, packed, scale, block_size, quant_type, columns, bias)
    else:
        slices = Slices(packed, scale, block_size, quant_type, shape, x.dtype)
        for begin, end, weight in slices.of_rows(slice_rows(M, shape, x.itemsize)):
            _multiply(rows, weight.t(), None if bias is None else bias[begin:end], columns[:, begin:end])
    return out


@linear_4bit_grad_input.triton
def _launch_linear_4bit_grad_input(
    grad: Tensor, packed: Tensor, scale: Tensor, block_size: int, quant_type: str, shape: list[int]
) -> Tensor:
    out = _linear_4bit_grad_input_fake(grad, packed, scale, block_size, quant_type, shape)
    N = shape[0]
    if out.numel() == 0 or N == 0:
        return out.zero_()
    rows, sums = rows_of(grad), rows_of(out)
    slices = Slices(packed, scale, block_size, quant_type, shape, grad.dtype)
    for begin, end, weight in slices.of_rows(N):
        torch.mm(rows[:, begin:end], weight, out=sums)
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x @ weight + bias into out, a range of columns."""
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def slice_rows(M: int, shape: list[int], itemsize: int) -> int:
    """Rows of W that are read back at once for M rows of x: half of a large W, else all."""
    N, K = shape
    half = -(-N // (2 * _ALIGNED_ROWS)) * _ALIGNED_ROWS
    return half if N * K * itemsize > _WORTH_TWO else N


_WORTH_TWO = 32 * 2**20  # bytes of a W whose second half is read back while the first is multiplied
_ALIGNED_ROWS = 256  # of a slice: whole tiles of the GEMM, and whole blocks and bytes whatever K is


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class Slices:
    """W of `shape` (N, K), read back range by range."""

    packed: Tensor
    scale: Tensor
    block_size: int
    quant_type: str
    shape: list[int]
    dtype: torch.dtype

    def of_rows(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """begin, end, and the rows of W between them: valid until the next but one is asked for.

        On a GPU the next range is read back on a stream of its own while this one is used. What it reads and writes is
        safe: the current stream waits for it before it ends.
        """
        N, K = self.shape
        whole = rows * K % self.block_size == 0  # ranges begin with a block, and so with a byte
        rows = rows if whole else N
        ranges = [(begin, min(begin + rows, N)) for begin in range(0, N, rows)]
        buffers = [self.packed.new_empty(min(rows, N), K, dtype=self.dtype) for _ in ranges[:2]]
        read = self._read(*ranges[0], buffers[0])
        for i, (begin, end) in enumerate(ranges):
            weight = read
            if i + 1 == len(ranges):
                yield begin, end, weight
            elif self.packed.is_cuda:
                current, side = torch.cuda.current_stream(), _side_stream(self.packed.device)
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    read = self._read(*ranges[i + 1], buffers[(i + 1) % 2])
                yield begin, end, weight
                current.wait_stream(side)
            else:
                yield begin, end, weight
                read = self._read(*ranges[i + 1], buffers[(i + 1) % 2])

    def _read(self, begin: int, end: int, buffer: Tensor) -> Tensor:
        first, last = begin * self.shape[1], end * self.shape[1]
        packed, scale = as_bytes(self.packed), self.scale.contiguous()
        weight = buffer[: end - begin]
        launch_dequantize(
            packed[first // 2 : (last + 1) // 2],
            scale[first // self.block_size : -(-last // self.block_size)],
            self.block_size,
            self.quant_type,
            weight,
        )
        return weight
