"""x @ W.t() for a row of x, or a few, and a W in 4 bits of any size: each value is unpacked where it lies.

    out[m, n] = sum over k of x[m, k] * (map[codes[n, k]] * scale of its block) + bias[n]

Packing is flat: with an odd K every other row of W begins in the middle of a byte, and blocks may cross rows. Products
are float32, and so are their sums. Where rows are whole words of eight codes and x has 16 bits, words are unpacked in
registers, map values are those of that dtype, and a scale multiplies the sum of eight products.

Source: QLoRA, section 3, https://arxiv.org/abs/2305.14314
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels._triton import tl, triton
from lq_kernels.blockwise_4bit import dequantize_4bit
from lq_kernels.layout_4bit import aligned_words, as_bytes, check_product, rows_of
from lq_kernels.nibble_codes import decode_table
from lq_kernels.nibble_words import has_ptx, word_table, word_values

_BLOCK_N, _BLOCK_K = 8, 512  # rows of W of a program, and how much of each at once


@op
def gemv_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    """x (..., K) @ W.t() + bias -> (..., N) in the dtype of x; W of `shape` (N, K) as `quantize_4bit` packed it.

    x is float32, bfloat16 or float16, bias (N,) one of these or None. Any K, N and number of rows, 0 included; W is
    read once for each row of x. Products and sums are float32, rounded once. ValueError: sizes that do not fit.
    """
    check_product(x, packed, scale, block_size, quant_type, shape, bias)
    weight = dequantize_4bit.reference(packed, scale, block_size, quant_type, shape, torch.float32)
    out = x.float() @ weight.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@gemv_4bit.fake
def _gemv_4bit_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    check_product(x, packed, scale, block_size, quant_type, shape, bias)
    return x.new_empty(*x.shape[:-1], shape[0])


@triton.jit
def _gemv_4bit_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    table = tl.load(table_ptr + tl.arange(0, 16))
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (n < N)[:, None] & (k < K)[None, :]
        index = n.to(tl.int64)[:, None] * K + k[None, :]
        byte = tl.load(packed_ptr + index // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 - 4 * (index % 2)).to(tl.int32)) & 15
        scale = tl.load(scale_ptr + index // BLOCK_SIZE, mask=mask, other=0.0)
        value = tl.reshape(tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), axis=0), (BLOCK_N, BLOCK_K))
        x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
        total += value * scale * x[None, :]
    out = tl.sum(total, axis=1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.heuristics({"WHOLE": lambda args: args["N"] % args["BLOCK_N"] == 0 and args["K"] % (8 * args["WORDS"]) == 0})
@triton.jit
def _gemv_words_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """WORDS of eight codes of BLOCK_N rows at once, for BLOCK_M rows of x; a word lies in one block."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64) * (K // 8)
    x_ptr += m.to(tl.int64)[:, None, None] * stride_xm
    here = (m < M)[:, None, None]
    total = tl.zeros((BLOCK_M, BLOCK_N, WORDS), tl.float32)
    for step in range(0, tl.cdiv(K // 8, WORDS)):
        word = step * WORDS + tl.arange(0, WORDS)
        at = row[:, None] + word[None, :]
        mask = None if WHOLE else (n < N)[:, None] & (word < K // 8)[None, :]
        # A word for a thread, so that x, of which the loads are narrow, has the layout of W without a detour.
        words_at = tl.max_contiguous(tl.multiple_of(words_ptr + at, (4, 4)), (1, 1))
        words = tl.load(words_at, mask=mask, other=None if WHOLE else 0)
        scale = tl.load(scale_ptr + at // (BLOCK_SIZE // 8), mask=mask, other=None if WHOLE else 0.0)
        values = word_values(words, table_ptr, dtype, DECODE)
        known = here if WHOLE else here & (word < K // 8)[None, None, :]
        part = tl.zeros((BLOCK_M, BLOCK_N, WORDS), tl.float32)
        for i in tl.static_range(8):
            x = tl.load(x_ptr + 8 * word[None, None, :] + i, mask=known, other=0.0).to(tl.float32)
            part += values[i][None, :, :] * x
        total += part * scale[None, :, :]
    out = tl.sum(total, axis=2)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptr += m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@gemv_4bit.triton
def _launch_gemv_4bit(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None = None,
) -> Tensor:
    out = _gemv_4bit_fake(x, packed, scale, block_size, quant_type, shape, bias)
    if out.numel():
        rows = rows_of(x)
        launch_gemv(rows, packed, scale, block_size, quant_type, out.view(len(rows), shape[0]), bias)
    return out


@dataclass(frozen=True)
class Words:
    """m rows of x, n of W, and so many words of each at once."""

    m: int
    n: int
    words: int
    warps: int


WORDS = (Words(1, 8, 128, 4), Words(2, 8, 128, 4), Words(4, 4, 128, 4))


def fits_words(x: Tensor, shape: list[int]) -> bool:
    """Whether rows of W are whole words, for an x of 16 bits."""
    return x.dtype in (torch.bfloat16, torch.float16) and shape[1] % 8 == 0


def launch_gemv(
    x: Tensor, packed: Tensor, scale: Tensor, block_size: int, quant_type: str, out: Tensor, bias: Tensor | None
) -> None:
    """Fills out (M, N), contiguous and not empty."""
    (M, K), N = x.shape, out.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    if fits_words(x, [N, K]):
        words = next((words for words in WORDS if words.m >= M), WORDS[-1])
        launch_words(x, packed, scale, block_size, quant_type, out, bias, words)
        return
    _gemv_4bit_kernel[(triton.cdiv(N, _BLOCK_N), M)](
        x,
        as_bytes(packed),
        scale.contiguous(),
        decode_table(quant_type, x.device),
        bias,
        out,
        N,
        K,
        x.stride(0),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        BLOCK_SIZE=block_size,
    )


def launch_words(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    out: Tensor,
    bias: Tensor | None,
    words: Words,
) -> None:
    """`launch_gemv` where `fits_words`."""
    (M, K), N = x.shape, out.shape[1]
    _gemv_words_kernel[(triton.cdiv(N, words.n), triton.cdiv(M, words.m))](
        x,
        aligned_words(packed),
        scale.contiguous(),
        word_table(quant_type, x.dtype, x.device),
        bias,
        out,
        M,
        N,
        K,
        x.stride(0),
        BLOCK_M=words.m,
        BLOCK_N=words.n,
        WORDS=words.words,
        BLOCK_SIZE=block_size,
        DECODE="prmt" if has_ptx(x.device) else "portable",
        num_warps=words.warps,
    )
