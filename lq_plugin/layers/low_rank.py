"""The two thin products of LoRA, with a backward pass that keeps x and x @ A.t(), and nothing as wide as the output.

    h = x @ A.t()                 (T, r)
    y = base(x) + scale h @ B.t() (T, O)

`down` hands x on to the base, so that in backward the gradient that comes back from the base and the one through A are
one product: grad_x = grad_base + grad_h @ A. `up` adds into the output of the base in place: neither direction copies
or keeps anything of size (T, O). x is kept as it came, in its own dtype, and so is shared by all layers that read it;
with dropout a mask of one byte an element is kept beside it. While torch.compile traces, the same products are written
plainly, for the compiler fuses them itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lq_plugin.layers.frozen import output_dtype


def down(x: Tensor, a: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """x (..., I), a (r, I) of any float dtype -> x for the base, and h (T, r) = dropout(x) @ a.t().

    dropout: the share of x that is set to zero on its way to a; the base sees all of x.
    """
    dtype = output_dtype(x)
    if torch.compiler.is_compiling():
        rows = F.dropout(x, dropout) if dropout else x
        return x, rows.reshape(-1, x.shape[-1]).to(dtype) @ a.to(dtype).t()
    dropped = mask = None
    if dropout:
        with torch.no_grad():
            dropped, mask = torch.native_dropout(x, dropout, True)
    same_x, h = _Down.apply(x, a, dropped, mask, 1.0 / (1.0 - dropout), dtype)
    return (same_x if x.requires_grad else x), h


def up(y: Tensor, h: Tensor, b: Tensor, scale: float, in_place: bool = True) -> Tensor:
    """y (..., O), h (T, r), b (O, r) -> y + scale h @ b.t(), in the dtype of y.

    in_place: y is overwritten; autograd raises where somebody kept it for their backward pass.
    """
    if not torch.compiler.is_compiling():
        return _Up.apply(y, h, b, scale, in_place)
    return _added(y.reshape(-1, y.shape[-1]), h, b.to(h.dtype), scale).view(y.shape)


def _added(rows: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    if rows.dtype == h.dtype:
        return torch.addmm(rows, h, b.t(), alpha=scale)
    return torch.add(rows, (h @ b.t()).to(rows.dtype), alpha=scale)


class _Down(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, dropped: Tensor | None, mask: Tensor | None, kept: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, mask)
        ctx.kept = kept
        rows = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
        return x.view_as(x), rows.to(dtype) @ a.to(dtype).t()

    @staticmethod
    def backward(ctx: Any, grad_base: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, mask = ctx.saved_tensors
        grad_x, grad_a = grad_base, None
        if grad_h is not None and ctx.needs_input_grad[0]:
            grad_x = _joined(grad_base, grad_h, a.to(grad_h.dtype), x, None if mask is None else mask * ctx.kept)
        if grad_h is not None and ctx.needs_input_grad[1]:
            dropped = x if mask is None else x * (mask * ctx.kept).to(x.dtype)
            grad_a = (grad_h.t() @ dropped.reshape(-1, x.shape[-1]).to(grad_h.dtype)).to(a.dtype)
        return grad_x if ctx.needs_input_grad[0] else None, grad_a, None, None, None, None


def _joined(grad_base: Tensor | None, grad_h: Tensor, a: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
    """grad_base + factor * (grad_h @ a), in the shape and dtype of x."""
    if grad_base is not None and factor is None and grad_base.dtype == grad_h.dtype:
        return torch.addmm(grad_base.reshape(-1, x.shape[-1]), grad_h, a).view(x.shape)
    through_a = (grad_h @ a).view(x.shape).to(x.dtype)
    if factor is not None:
        through_a = through_a * factor.to(x.dtype)
    return through_a if grad_base is None else grad_base + through_a


class _Up(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, scale: float, in_place: bool) -> Tensor:
        ctx.save_for_backward(h, b)
        ctx.scale = scale
        rows, b = y.reshape(-1, y.shape[-1]), b.to(h.dtype)
        if in_place and rows.dtype == h.dtype:
            # Not declared to autograd: the gradient of y is that of the result, whatever y was a view of.
            return rows.detach().addmm_(h, b.t(), alpha=scale).view(y.shape)
        return _added(rows, h, b, scale).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, b = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(h.dtype)
        grad_h = (rows @ b.to(h.dtype)) * ctx.scale if ctx.needs_input_grad[1] else None
        grad_b = ((rows.t() @ h) * ctx.scale).to(b.dtype) if ctx.needs_input_grad[2] else None
        return grad, grad_h, grad_b, None, None
