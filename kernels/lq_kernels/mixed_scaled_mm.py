"""The matrix product of LLM.int8(): int8 for most columns of x, floats for those with outliers, in one kernel.

    out = float32(codes @ weight_codes.t()) * scale * weight_scale.t() + bias     (int32 sums, exact)
        + x[:, outliers] @ weight[:, outliers].t()                                (float32 sums)

    weight = weight_codes * weight_scale, rounded to the dtype of x

The list of outlier columns and their number are read on the device: the host waits for nothing, and without outliers
the sum over them is skipped.

Source: LLM.int8(), section 3.2, https://arxiv.org/abs/2208.07339
"""

import torch
from torch import Tensor

from lq_kernels._op import op
from lq_kernels.mixed_scaled_mm_tile import launch_mixed_tiles
from lq_kernels.mixed_scaled_mm_tma import launch_mixed_tma, mixed_tile_for
from lq_kernels.scaled_mm import LARGEST_K, int8_mm

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@op
def mixed_scaled_mm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x (M, K) float and its codes (M, K) int8, weight_codes (N, K) int8 -> (M, N) in `out_dtype`.

    codes, scale (M, 1) float32, columns (K,) int32 and count (1,) int32 as `quantize_rowwise_outliers` returns them;
    weight_codes and weight_scale (N, 1) or (1, 1) float32 as `quantize_rowwise` returns them; bias (N,) float or None.
    x and out_dtype are float32, bfloat16 or float16. All but the int32 sums is float32, rounded once to out_dtype. Any
    strides, any size up to K = LARGEST_K, 0 included. A NaN or an infinity in x makes its row of the result NaN or
    infinite: by its scale, or as an outlier. ValueError, TypeError: operands that do not fit each other.
    """
    _check(x, codes, scale, weight_codes, weight_scale, columns, count, bias, out_dtype)
    out = int8_mm.reference(codes, weight_codes.t()).float() * scale * weight_scale.t()
    out += 0.0 if bias is None else bias.float()
    outliers = columns[: int(count)]
    weight = (weight_codes[:, outliers].float() * weight_scale).to(x.dtype)
    return (out + x[:, outliers].float() @ weight.t().float()).to(out_dtype)


@mixed_scaled_mm.fake
def _mixed_scaled_mm_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(x, codes, scale, weight_codes, weight_scale, columns, count, bias, out_dtype)
    return x.new_empty(x.shape[0], weight_codes.shape[0], dtype=out_dtype)


def _check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if x.ndim != 2 or weight_codes.ndim != 2 or x.shape[1] != weight_codes.shape[1] or codes.shape != x.shape:
        raise ValueError(
            "mixed_scaled_mm takes x and codes (M, K) and weight_codes (N, K), "
            f"got {tuple(x.shape)}, {tuple(codes.shape)} and {tuple(weight_codes.shape)}"
        )
    (M, K), N = x.shape, weight_codes.shape[0]
    if K > LARGEST_K:
        raise ValueError(f"mixed_scaled_mm sums at most {LARGEST_K} products in int32, got K = {K}: split K")
    for name, tensor, shapes, dtypes in (
        ("x", x, [(M, K)], _FLOATS),
        ("codes", codes, [(M, K)], (torch.int8,)),
        ("weight_codes", weight_codes, [(N, K)], (torch.int8,)),
        ("scale", scale, [(M, 1)], (torch.float32,)),
        ("weight_scale", weight_scale, [(N, 1), (1, 1)], (torch.float32,)),
        ("columns", columns, [(K,)], (torch.int32,)),
        ("count", count, [(1,)], (torch.int32,)),
        ("bias", bias, [(N,)], _FLOATS),
    ):
        if tensor is not None and (tuple(tensor.shape) not in shapes or tensor.dtype not in dtypes):
            raise ValueError(
                f"mixed_scaled_mm takes {name} {' or '.join(map(str, shapes))} of {' or '.join(map(str, dtypes))}, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
    devices = {t.device for t in (x, codes, scale, weight_codes, weight_scale, columns, count, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"mixed_scaled_mm takes tensors of one device, got {sorted(map(str, devices))}: move them")
    if out_dtype not in _FLOATS:
        raise TypeError(f"mixed_scaled_mm returns float32, bfloat16 or float16, not {out_dtype}")


@mixed_scaled_mm.triton
def _launch(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: Tensor,
    count: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _mixed_scaled_mm_fake(x, codes, scale, weight_codes, weight_scale, columns, count, bias, out_dtype)
    if out.numel() == 0:
        return out
    bias, columns = None if bias is None else bias.contiguous(), columns.contiguous()
    tma_tile = mixed_tile_for(x, codes, weight_codes, out)
    operands = (x, codes, scale, weight_codes, weight_scale, columns, count, bias, out)
    if tma_tile is None:
        launch_mixed_tiles(*operands)
    else:
        launch_mixed_tma(*operands, tma_tile)
    return out
