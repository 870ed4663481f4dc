"""How 4-bit codes lie in memory: which formats there are, how much they take, and what is refused."""

import math

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")

_VECTOR = 16  # bytes that a thread reads at once
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bytes_of(numel: int) -> int:
    return (numel + 1) // 2


def blocks_of(numel: int, block_size: int) -> int:
    return (numel + block_size - 1) // block_size


def as_bytes(packed: Tensor) -> Tensor:
    """(bytes,) uint8; of a contiguous tensor a view."""
    return packed.contiguous().view(-1).view(torch.uint8)


def aligned_words(packed: Tensor) -> Tensor:
    """(bytes // 4,) int32 at a multiple of 16 bytes, a view where that is possible."""
    codes = as_bytes(packed)
    codes = codes[: codes.numel() // 4 * 4]
    return (codes.clone() if codes.data_ptr() % _VECTOR else codes).view(torch.int32)


def rows_of(x: Tensor) -> Tensor:
    """x (..., K) -> (M, K), a view where that is possible."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_quantize(x: Tensor, block_size: int, quant_type: str, storage: torch.dtype) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"4-bit quantisation takes float32, bfloat16 or float16, got {x.dtype}: cast it, x.float()")
    _check_format(block_size, quant_type)
    if bytes_of(x.numel()) % storage.itemsize:
        raise RuntimeError(
            f"{x.numel()} values make {bytes_of(x.numel())} bytes, which cannot be viewed as {storage} of "
            f"{storage.itemsize} bytes each: use uint8"
        )


def check_codes(packed: Tensor, block_size: int, quant_type: str, numel: int, dtype: torch.dtype) -> None:
    """Raises unless `numel` values can be read back from packed in `dtype`."""
    _check_format(block_size, quant_type)
    check_bytes(packed, numel)
    if dtype not in _FLOATS:
        raise ValueError(f"4-bit codes are read as float32, bfloat16 or float16, not as {dtype}")


def check_bytes(packed: Tensor, numel: int) -> None:
    if packed.numel() * packed.itemsize != bytes_of(numel):
        raise ValueError(
            f"{numel} values take {bytes_of(numel)} bytes, got {packed.dtype} {tuple(packed.shape)}: wrong shape?"
        )


def check_scale(scale: Tensor, numel: int, block_size: int) -> None:
    expected = (blocks_of(numel, block_size),)
    if scale.shape != expected or scale.dtype != torch.float32:
        raise ValueError(
            f"{numel} values in blocks of {block_size} need a float32 scale of shape {expected}, "
            f"got {scale.dtype} {tuple(scale.shape)}: was it made with another block size?"
        )


def check_contiguous(tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is written in place and must be contiguous, got strides {tensor.stride()}")


def _check_format(block_size: int, quant_type: str) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")


def check_product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    block_size: int,
    quant_type: str,
    shape: list[int],
    bias: Tensor | None,
) -> None:
    """Raises unless x (..., K) can be multiplied by the packed W of `shape` (N, K), and the bias is (N,)."""
    if len(shape) != 2 or x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"a 4-bit product takes x (..., K) and W (N, K), got {tuple(x.shape)} and {tuple(shape)}")
    check_codes(packed, block_size, quant_type, shape[0] * shape[1], x.dtype)
    check_scale(scale, shape[0] * shape[1], block_size)
    if bias is not None and (bias.shape != (shape[0],) or bias.dtype not in _FLOATS):
        raise ValueError(f"the bias of W {tuple(shape)} is a float ({shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    devices = {tensor.device for tensor in (x, packed, scale, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"a 4-bit product takes tensors of one device, got {sorted(map(str, devices))}: move them")
