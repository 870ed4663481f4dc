"""Products of 8-bit matrices: codes_a @ codes_b * scales + bias for int8 and fp8, and int8 sums alone.

Source of the epilogue: SwitchBack, https://arxiv.org/abs/2304.13013, section 2; here it is one kernel without split K,
so that the bias is added once and a result never depends on the order in which programs finish.

int8 sums are exact. NVIDIA's matrix units add fp8 products with about 14 bits: they align 32 products and the running
sum to the largest of these and cut off what lies below, https://arxiv.org/abs/2412.19437, section 3.5.2. With m that
largest magnitude, 32 products lose less than 33 * 2^-12 * m. With accumulation="fast" there is one running sum (that
report saw errors of 2 % at K = 4096); "precise" starts one every 256 products, 128 or 64 in smaller tiles, and adds
those in float32, so that m stays as small as a sum of so many.
"""

from functools import cache

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels.element_types import ELEMENT_TYPES, require_element_type
from lq_kernels.scaled_mm_tile import launch_tiles, tile_for
from lq_kernels.scaled_mm_tma import launch_tma, tma_tile_for

LARGEST_K = 131_071  # sums of more products of -128 and -128 can leave int32

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str = "fast",
) -> Tensor:
    """a (M, K) @ b (K, N) -> (M, N) in `out_dtype`: float32(a @ b) * scale_a * scale_b + bias.

    a and b int8, or each of them float8_e4m3fn or float8_e5m2; scale_a (M, 1) or (1, 1), scale_b (1, N) or (1, 1),
    float32; bias (N,) float32, bfloat16, float16 or None; out_dtype float32, bfloat16 or float16; accumulation of fp8
    "fast" or "precise". a and b may have any strides; matrix units want rows of a and columns of b contiguous
    (b = codes.t()). int8 sums are exact, the rest is float32, rounded once to out_dtype. Any size, 0 included, for int8
    up to K = LARGEST_K: without K the result is the bias, or zeros. fp8 on a GPU without it is a RuntimeError.
    """
    _check(a, b, scale_a, scale_b, bias, out_dtype, accumulation)
    sums = _exact_mm(a, b).float() if a.dtype == torch.int8 else a.float() @ b.float()
    out = sums * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


@scaled_mm.fake
def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str = "fast",
) -> Tensor:
    _check(a, b, scale_a, scale_b, bias, out_dtype, accumulation)
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


@scaled_mm.triton
def _launch_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str = "fast",
) -> Tensor:
    out = _scaled_mm_fake(a, b, scale_a, scale_b, bias, out_dtype, accumulation)
    for operand in (a, b):
        require_element_type(operand.dtype, a.device, "scaled_mm")
    bias = None if bias is None else bias.contiguous()
    _multiply(a, b, scale_a, scale_b, bias, out, accumulation == "precise" and a.dtype != torch.int8)
    return out


@op
def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 @ b (K, N) int8 -> (M, N) int32, exact; any strides and any size up to K = LARGEST_K."""
    _check_operands(a, b, "int8_mm")
    return _exact_mm(a, b)


@int8_mm.fake
def _int8_mm_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_operands(a, b, "int8_mm")
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.int32)


@int8_mm.triton
def _launch_int8_mm(a: Tensor, b: Tensor) -> Tensor:
    out = _int8_mm_fake(a, b)
    _multiply(a, b, None, None, None, out, precise=False)
    return out


def _multiply(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    precise: bool,
) -> None:
    if out.numel() == 0:
        return
    tma_tile = tma_tile_for(a, b, out, precise)
    if tma_tile is not None:
        launch_tma(a, b, scale_a, scale_b, bias, out, precise, tma_tile)
    else:
        launch_tiles(a, b, scale_a, scale_b, bias, out, precise, tile_for(a, b, precise))


def _exact_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in int32."""
    # torch 2.13's _int_mm is wrong for expanded operands, and where a side of 1 leaves its strides ambiguous.
    if _int_mm_is_exact() and 1 not in (*a.shape, *b.shape):
        return torch._int_mm(a.contiguous(), b if b.t().is_contiguous() else b.contiguous())
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_IN_FLOAT32):
        k = slice(start, start + _EXACT_IN_FLOAT32)
        out += (a[:, k].float() @ b[k].float()).int()
    return out


_EXACT_IN_FLOAT32 = 1024  # 1024 products of -128 and -128 add up to 2^24: every partial sum is a float32


@cache
def _int_mm_is_exact() -> bool:
    """Whether this CPU adds int8 products without saturation; those before VNNI add pairs of them in int16."""
    extremes = torch.tensor([127, -128, 127, 127, -128, -128, 127, -128], dtype=torch.int8)
    for rows in (1, 64):
        a = extremes.repeat(rows, 32)
        for b in (a, torch.full_like(a, 127), torch.full_like(a, -128)):
            if not torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.t().long()).int()):
                return False
    return True


def _check(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str,
) -> None:
    if a.dtype == torch.int8 or b.dtype == torch.int8:
        _check_operands(a, b, "scaled_mm")
    else:
        _check_shapes(a, b, "scaled_mm")
        if a.dtype not in ELEMENT_TYPES or b.dtype not in ELEMENT_TYPES:
            raise TypeError(
                f"scaled_mm takes int8 or fp8 codes, got {a.dtype} and {b.dtype}: quantize them with lq_kernels.rowwise"
            )
    devices = {x.device for x in (a, b, scale_a, scale_b, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"scaled_mm takes tensors of one device, got {sorted(map(str, devices))}: move them to one")
    _check_scale("scale_a", scale_a, (a.shape[0], 1))
    _check_scale("scale_b", scale_b, (1, b.shape[1]))
    if bias is not None and (bias.shape != (b.shape[1],) or bias.dtype not in _FLOATS):
        raise ValueError(
            f"scaled_mm takes a bias of shape {(b.shape[1],)}, float32, bfloat16 or float16, "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )
    if out_dtype not in _FLOATS:
        raise TypeError(f"scaled_mm returns float32, bfloat16 or float16, not {out_dtype}")
    if accumulation not in ("fast", "precise"):
        raise ValueError(f"scaled_mm takes accumulation 'fast' or 'precise', got {accumulation!r}")


def _check_operands(a: Tensor, b: Tensor, name: str) -> None:
    """Both int8, of shapes that fit, and few enough products for int32."""
    _check_shapes(a, b, name)
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"{name} takes int8 codes, got {a.dtype} and {b.dtype}: quantize them with lq_kernels.rowwise")
    if a.device != b.device:
        raise ValueError(f"{name} takes tensors of one device, got {a.device} and {b.device}: move them to one")
    if a.shape[1] > LARGEST_K:
        raise ValueError(f"{name} sums at most {LARGEST_K} products in int32, got K = {a.shape[1]}: split K")


def _check_shapes(a: Tensor, b: Tensor, name: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{name} takes a (M, K) and b (K, N), got {tuple(a.shape)} and {tuple(b.shape)}")


def _check_scale(name: str, scale: Tensor, shape: tuple[int, int]) -> None:
    if scale.dtype != torch.float32 or scale.ndim != 2 or tuple(scale.shape) not in (shape, (1, 1)):
        raise ValueError(
            f"scaled_mm takes {name} float32 of shape {shape} or (1, 1), got {tuple(scale.shape)} {scale.dtype}"
        )
