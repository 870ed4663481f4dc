"""How 4-bit codes lie in memory: which formats there are, how much they take, and what is refused."""

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def bytes_of(numel: int) -> int:
    return (numel + 1) // 2


def blocks_of(numel: int, block_size: int) -> int:
    return (numel + block_size - 1) // block_size


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
