"""The optimizer updates of `bitsandbytes.functional` under their names: one tensor, flat blocks of 256, any map.

Formulas are those of optimizer_rules' rules; where bitsandbytes' kernels differ from each other, these hold: weights
decay before the update, gnorm_scale is part of the gradient everywhere, NaN reaches the parameter. "adam" is AdamW,
"momentum" SGD without dampening, and "lamb" and "lars" are Adam and SGD whose update is clipped to the norm of the
parameter; classes that follow the papers are in lq_plugin.optim. Moments of 8 bits pass through float32 memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.adam_rules import Adam, AdEMAMix
from lq_kernels.adaptive_rules import Adagrad, RMSprop
from lq_kernels.approximate import has_ptx
from lq_kernels.blockwise import BLOCK_SIZE, dequantize_blockwise, quantize_blockwise_out
from lq_kernels.momentum_rules import SGD, Lion
from lq_kernels.optimizer_rules import Rule

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 1024


@dataclass(frozen=True)
class _Hyper:
    """What the two functions take, under bitsandbytes' names."""

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    lr: float

    def adam(self) -> Rule:
        return Adam(
            lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay, decoupled=True
        )

    def ademamix(self) -> Rule:
        betas = (self.beta1, self.beta2, self.beta3)
        return AdEMAMix(lr=self.lr, betas=betas, alpha=self.alpha, eps=self.eps, weight_decay=self.weight_decay)

    def momentum(self) -> Rule:
        return SGD(lr=self.lr, momentum=self.beta1, weight_decay=self.weight_decay)

    def rmsprop(self) -> Rule:
        return RMSprop(lr=self.lr, alpha=self.beta1, eps=self.eps, weight_decay=self.weight_decay)

    def adagrad(self) -> Rule:
        return Adagrad(lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)

    def lion(self) -> Rule:
        return Lion(lr=self.lr, betas=(self.beta1, self.beta2), weight_decay=self.weight_decay)


_RULES: dict[str, Callable[[_Hyper], Rule]] = {
    "adam": _Hyper.adam,
    "lamb": _Hyper.adam,
    "ademamix": _Hyper.ademamix,
    "momentum": _Hyper.momentum,
    "lars": _Hyper.momentum,
    "rmsprop": _Hyper.rmsprop,
    "adagrad": _Hyper.adagrad,
    "lion": _Hyper.lion,
}


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step in place on p (any shape, float) with float32 states of its shape; g has its shape, step counts from 1.

    "ademamix" has both averages in state1 (2, *p.shape). max_unorm > 0 clips the update of adam, lamb, momentum, lars
    and rmsprop to max_unorm ||p||, and its norm is written to unorm_vec (1,). With skip_zeros an element whose gradient
    is 0 keeps parameter and state to the bit. Nothing waits for the device. Raises ValueError for other names, shapes
    and types.
    """
    rule = _rule(optimizer_name, _Hyper(beta1, beta2, beta3, alpha, eps, weight_decay, lr))
    _check(optimizer_name, rule, g, p, state1, state2, torch.float32)
    moments = _moments(state1, state2, rule)
    clip = _clip(rule, p, g * gnorm_scale, moments, step, max_unorm) if max_unorm > 0 else None
    if clip is not None and unorm_vec is not None:
        unorm_vec.copy_(clip[1])
    _update(rule, p, g, moments, step, gnorm_scale, None if clip is None else clip[0], skip_zeros)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """The same with uint8 states: values qmap[state] * absmax of their flat block of 256; qmap (256,), ascending.

    absmax is float32 (ceil(numel / 256),), for "ademamix" absmax1 (2, ceil(numel / 256)). The parameter moves by the
    new moments before they are quantised. With skip_zeros an element whose gradient is 0 keeps its parameter to the
    bit; its state is quantised again beside its neighbours, within half a code.
    """
    rule = _rule(optimizer_name, _Hyper(beta1, beta2, beta3, alpha, eps, weight_decay, lr))
    _check(optimizer_name, rule, g, p, state1, state2, torch.uint8)
    stored = list(
        zip(_moments(state1, state2, rule), _maps(qmap1, qmap2), _scales(absmax1, absmax2, rule), strict=False)
    )
    _check_scales(p, [absmax for _, _, absmax in stored])
    moments = [dequantize_blockwise(codes.contiguous(), absmax, code, BLOCK_SIZE) for codes, code, absmax in stored]
    _update(rule, p, g, moments, step, gnorm_scale, None, skip_zeros)
    for moment, (codes, code, absmax) in zip(moments, stored, strict=True):
        quantize_blockwise_out(moment, code, BLOCK_SIZE, codes, absmax)


def _rule(name: str, hyper: _Hyper) -> Rule:
    if name not in _RULES:
        raise ValueError(f"no optimizer is called {name!r}; known: {', '.join(_RULES)}")
    return _RULES[name](hyper)


def _check(
    name: str, rule: Rule, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, dtype: torch.dtype
) -> None:
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(f"g {tuple(g.shape)} on {g.device} is not the gradient of p {tuple(p.shape)} on {p.device}")
    for what, tensor in (("p", p), ("g", g)):
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{what} is float32, bfloat16 or float16, got {tensor.dtype}")
    shape1 = (2, *p.shape) if isinstance(rule, AdEMAMix) else tuple(p.shape)
    needs_second = isinstance(rule, Adam | AdEMAMix)
    if needs_second != (state2 is not None):
        raise ValueError(f"{name!r} has {'two states' if needs_second else 'one state'}, got state2={state2!r}")
    for what, state, shape in (("state1", state1, shape1), ("state2", state2, tuple(p.shape))):
        if state is not None and (tuple(state.shape) != shape or state.dtype != dtype or not state.is_contiguous()):
            raise ValueError(
                f"{what} of {name!r} is a contiguous {dtype} of shape {shape}, got {state.dtype} {tuple(state.shape)}"
            )


def _check_scales(p: Tensor, scales: list[Tensor]) -> None:
    expected = (-(-p.numel() // BLOCK_SIZE),)
    for absmax in scales:
        if tuple(absmax.shape) != expected or absmax.dtype != torch.float32 or not absmax.is_contiguous():
            raise ValueError(
                f"{p.numel()} values in blocks of {BLOCK_SIZE} need a contiguous float32 absmax of shape {expected}, "
                f"got {absmax.dtype} {tuple(absmax.shape)}"
            )


def _moments(state1: Tensor, state2: Tensor | None, rule: Rule) -> list[Tensor]:
    """In the order of the rule's; views of the states."""
    if isinstance(rule, AdEMAMix):
        assert state2 is not None
        return [state1[0], state2, state1[1]]
    return [state1] if state2 is None else [state1, state2]


def _maps(qmap1: Tensor, qmap2: Tensor | None) -> list[Tensor]:
    return [qmap1] if qmap2 is None else [qmap1, qmap2, qmap1]


def _scales(absmax1: Tensor, absmax2: Tensor | None, rule: Rule) -> list[Tensor]:
    if isinstance(rule, AdEMAMix):
        assert absmax2 is not None
        return [absmax1[0], absmax2, absmax1[1]]
    return [absmax1] if absmax2 is None else [absmax1, absmax2]


def _clip(
    rule: Rule, p: Tensor, g: Tensor, moments: list[Tensor], step: int, max_unorm: float
) -> tuple[Tensor, Tensor] | None:
    """min(1, max_unorm ||p|| / ||update||) and ||update||, without dimensions; None for rules that are not clipped."""
    numbers, p, g = rule.numbers(float(rule.lr), step), p.float(), g.float()
    limit = max_unorm * p.norm()
    if isinstance(rule, Adam):
        _, beta1, rest1, beta2, rest2, _, mean, root, eps = numbers[:9]
        m, v = beta1 * moments[0] + rest1 * g, beta2 * moments[1] + rest2 * g * g
        norm = (mean * m / (v.sqrt() * root + eps)).norm()
    elif isinstance(rule, SGD):
        decay, momentum, share, _ = numbers
        norm = (momentum * moments[0] + share * (g + decay * p)).norm()
    elif isinstance(rule, RMSprop):
        decay, eps, _, alpha, rest, _ = numbers
        g = g + decay * p
        norm = (g / ((alpha * moments[0] + rest * g * g).sqrt() + eps)).norm()
    else:
        return None
    return torch.where(norm > limit, limit / norm, 1.0), norm


def _update(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    moments: list[Tensor],
    step: int,
    gnorm_scale: float,
    trust: Tensor | None,
    skip_zeros: bool,
) -> None:
    """p and float32 moments change in place; `trust` shortens the step but not the decay."""
    kept = 1 - float(rule.lr) * rule.weight_decay if isinstance(rule, Adam) else 1.0
    if p.is_cuda:
        _launch_update(rule, p, g, moments, step, gnorm_scale, trust, skip_zeros, kept)
        return
    before, old = p.float().clone(), [moment.clone() for moment in moments]
    new = before.clone()
    rule.update(new, g.float() * gnorm_scale, moments, rule.numbers(float(rule.lr), step), 1.0)
    if trust is not None:
        new = before * kept + trust * (new - before * kept)
    if skip_zeros:
        new = torch.where(g == 0, before, new)
        for moment, same in zip(moments, old, strict=True):
            moment.copy_(torch.where(g == 0, same, moment))
    p.copy_(new)


def _launch_update(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    moments: list[Tensor],
    step: int,
    gnorm_scale: float,
    trust: Tensor | None,
    skip_zeros: bool,
    kept: float,
) -> None:
    values = p.contiguous()
    numbers = torch.tensor(rule.numbers(float(rule.lr), step)).pin_memory().to(p.device, non_blocking=True)
    if p.numel():
        with torch.cuda.device(p.device):
            launch_flat(rule, values, g.contiguous(), moments, numbers, gnorm_scale, trust, skip_zeros, kept)
    if values is not p:
        p.copy_(values)
    torch.autograd.graph.increment_version([p, *moments])


def launch_flat(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    moments: list[Tensor],
    numbers: Tensor,
    gnorm_scale: float,
    trust: Tensor | None,
    skip_zeros: bool,
    kept: float,
) -> None:
    """One launch over contiguous tensors; `numbers` are the rule's, on their device."""
    first, second, third = (*moments, None, None)[:3]
    _flat_update_kernel[(triton.cdiv(p.numel(), _TILE),)](
        p,
        g,
        first,
        second,
        third,
        numbers,
        trust,
        float(gnorm_scale),
        float(kept),
        p.numel(),
        UPDATE=rule.kernels.update,
        DECAYS=rule.decays,
        VARIANT=rule.variant,
        SKIP_ZEROS=skip_zeros,
        PTX=has_ptx(),
        TILE=_TILE,
    )


@triton.jit
def _load_decayed(state_ptr, offset, mask, numbers_ptr, DECAYS: tl.constexpr, INDEX: tl.constexpr):
    """The moment as the rule takes it."""
    moment = tl.load(state_ptr + offset, mask=mask, other=0.0)
    if DECAYS[INDEX] is None:
        return moment
    else:
        return moment * tl.load(numbers_ptr + DECAYS[INDEX])


@triton.jit
def _flat_update_kernel(
    p_ptr,
    g_ptr,
    state1_ptr,
    state2_ptr,
    state3_ptr,
    numbers_ptr,
    trust_ptr,
    gnorm_scale,
    kept,
    numel,
    UPDATE: tl.constexpr,
    DECAYS: tl.constexpr,
    VARIANT: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    PTX: tl.constexpr,
    TILE: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = offset < numel
    before = tl.load(p_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    stored = mask & (grad != 0) if SKIP_ZEROS else mask
    g = grad * gnorm_scale
    m1 = g
    m2 = g
    m3 = g
    if state1_ptr is not None:
        m1 = _load_decayed(state1_ptr, offset, mask, numbers_ptr, DECAYS, 0)
    if state2_ptr is not None:
        m2 = _load_decayed(state2_ptr, offset, mask, numbers_ptr, DECAYS, 1)
    if state3_ptr is not None:
        m3 = _load_decayed(state3_ptr, offset, mask, numbers_ptr, DECAYS, 2)
    p, m1, m2, m3 = UPDATE(before, g, m1, m2, m3, numbers_ptr, 1.0, VARIANT, PTX)
    if trust_ptr is not None:
        p = before * kept + tl.load(trust_ptr) * (p - before * kept)
    tl.store(p_ptr + offset, p.to(p_ptr.dtype.element_ty), mask=stored)
    if state1_ptr is not None:
        tl.store(state1_ptr + offset, m1, mask=stored)
    if state2_ptr is not None:
        tl.store(state2_ptr + offset, m2, mask=stored)
    if state3_ptr is not None:
        tl.store(state3_ptr + offset, m3, mask=stored)
