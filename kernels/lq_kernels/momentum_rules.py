"""Rules with one momentum: SGD, LARS and Lion.

    SGD   g <- g + wd p;  m <- momentum m + (1 - dampening) g, the first time without dampening
          p <- p - lr m, with Nesterov p <- p - lr (g + momentum m), without momentum p <- p - lr g
    LARS  m <- momentum m + lr trust ||p|| / (||g|| + wd ||p||) (g + wd p);  p <- p - m
    Lion  p <- p (1 - lr wd) - lr sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g

sign(0) = 0, and LARS's local rate is 1 where ||p|| or its denominator is zero. Sources: torch.optim.SGD,
https://arxiv.org/abs/1708.03888 (algorithm 1), https://arxiv.org/abs/2302.06675
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.optimizer_rules import Rule, RuleKernels, float32, norm, norm_ratio

_DECAY, _MOMENTUM, _SHARE, _LR, _COEFFICIENT = map(tl.constexpr, range(5))
_BETA1, _REST1, _BETA2, _REST2 = map(tl.constexpr, range(4, 8))


@triton.jit
def _sgd_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: weight decay, momentum, 1 - dampening, LARS's trust."""
    tl.store(numbers_ptr + _DECAY, tl.load(hyper_ptr))
    tl.store(numbers_ptr + _MOMENTUM, tl.load(hyper_ptr + 1))
    tl.store(numbers_ptr + _SHARE, tl.where(step > 1, tl.load(hyper_ptr + 2), 1.0))
    tl.store(numbers_ptr + _LR, lr)
    tl.store(numbers_ptr + _COEFFICIENT, tl.load(hyper_ptr + 3))


@triton.jit
def _sgd_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    g += tl.load(numbers_ptr + _DECAY) * p
    if VARIANT != "plain":
        m += tl.load(numbers_ptr + _SHARE) * g
        g = g + tl.load(numbers_ptr + _MOMENTUM) * m if VARIANT == "nesterov" else m
    return p - tl.load(numbers_ptr + _LR) * g, m, v, s


@triton.jit
def _lars_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    g += tl.load(numbers_ptr + _DECAY) * p
    m += (tl.load(numbers_ptr + _LR) * trust) * g
    return p - m, m, v, s


@triton.jit
def _lars_measure(p, g, m, v, s, numbers_ptr, VARIANT: tl.constexpr, PTX: tl.constexpr):
    return p * p, g * g


@triton.jit
def _lars_trust(weight, gradient, numel, numbers_ptr):
    weight = tl.sqrt_rn(weight)
    numerator = tl.load(numbers_ptr + _COEFFICIENT) * weight
    denominator = tl.sqrt_rn(gradient) + tl.load(numbers_ptr + _DECAY) * weight
    moved = (numerator > 0) & (denominator > 0)
    return tl.where(moved, numerator / tl.where(moved, denominator, 1.0), 1.0)


@triton.jit
def _lion_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: weight decay and the betas."""
    tl.store(numbers_ptr + _DECAY, tl.load(hyper_ptr))
    tl.store(numbers_ptr + _LR, lr)
    for i in tl.static_range(2):
        beta = tl.load(hyper_ptr + 1 + i)
        tl.store(numbers_ptr + _BETA1 + 2 * i, beta)
        tl.store(numbers_ptr + _REST1 + 2 * i, 1.0 - beta)


@triton.jit
def _lion_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    lr = tl.load(numbers_ptr + _LR)
    direction = tl.load(numbers_ptr + _BETA1) * m + tl.load(numbers_ptr + _REST1) * g
    signed_lr = tl.where(direction > 0, lr, tl.where(direction < 0, -lr, direction * 0.0))  # NaN stays NaN
    p = p * (1.0 - lr * tl.load(numbers_ptr + _DECAY)) - signed_lr
    return p, tl.load(numbers_ptr + _BETA2) * m + tl.load(numbers_ptr + _REST2) * g, v, s


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """torch.optim.SGD; without momentum it has no state."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    kernels = RuleKernels(_sgd_numbers, _sgd_update, (1,))

    @property
    def signs(self) -> tuple[bool, ...]:
        return (True,) if self.momentum else ()

    @property
    def variant(self) -> str:
        return "plain" if not self.momentum else "nesterov" if self.nesterov else "momentum"

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, self.momentum, 1 - self.dampening, 0.0

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(self.weight_decay, self.momentum, 1 - self.dampening if step > 1 else 1.0, lr)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, momentum, share, lr = numbers
        g = g.add_(p, alpha=decay)
        if moments:
            moments[0].mul_(momentum).add_(g, alpha=share)
            g = g.add_(moments[0], alpha=momentum) if self.nesterov else moments[0]
        p.sub_(g, alpha=lr)


@dataclass(frozen=True, kw_only=True)
class LARS(Rule):
    """The momentum holds steps, learning rates included; `trust_coefficient` is the paper's eta."""

    momentum: float
    weight_decay: float
    trust_coefficient: float

    kernels = RuleKernels(_sgd_numbers, _lars_update, (1,), _lars_measure, _lars_trust)

    @property
    def signs(self) -> tuple[bool, ...]:
        return (True,)

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, self.momentum, 1.0, self.trust_coefficient

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(self.weight_decay, self.momentum, 1.0, lr, self.trust_coefficient)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, momentum, _, lr, _ = numbers
        moments[0].mul_(momentum).add_(g.add_(p, alpha=decay), alpha=lr * trust)
        p.sub_(moments[0])

    def trust(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> float:
        weight = norm(p)
        return norm_ratio(numbers[4] * weight, norm(g) + numbers[0] * weight)


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Steps of one size, in the direction of an average that looks less far back than the one it keeps."""

    betas: tuple[float, float]
    weight_decay: float

    kernels = RuleKernels(_lion_numbers, _lion_update, (None,))

    @property
    def signs(self) -> tuple[bool, ...]:
        return (True,)

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, *self.betas

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        beta1, beta2 = self.betas
        return float32(self.weight_decay, 0.0, 0.0, lr, beta1, 1 - beta1, beta2, 1 - beta2)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, _, _, lr, beta1, rest1, beta2, rest2 = numbers
        direction = (beta1 * moments[0]).add_(g, alpha=rest1)
        p.mul_(1 - lr * decay).sub_(direction.sign().where(~direction.isnan(), torch.nan), alpha=lr)
        moments[0].mul_(beta2).add_(g, alpha=rest2)
