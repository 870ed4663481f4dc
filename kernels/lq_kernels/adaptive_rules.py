"""Rules that divide by the root of a mean or a sum of squared gradients: RMSprop and Adagrad.

    RMSprop  g <- g + wd p;  v <- alpha v + (1 - alpha) g^2
             centered: a <- alpha a + (1 - alpha) g, and v - a^2 (not below 0) in the place of v
             u = g / (sqrt(v) + eps);  with momentum b <- momentum b + u in the place of u;  p <- p - lr u
    Adagrad  g <- g + wd p;  v <- v + g^2;  p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)

Sources: torch.optim.RMSprop, torch.optim.Adagrad.
"""

from dataclasses import dataclass

from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.approximate import reciprocal, square_root
from lq_kernels.optimizer_rules import Rule, RuleKernels, float32

_DECAY, _EPS, _LR, _ALPHA, _REST, _MOMENTUM = map(tl.constexpr, range(6))


@triton.jit
def _rmsprop_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: weight decay, eps, alpha, momentum."""
    alpha = tl.load(hyper_ptr + 2)
    tl.store(numbers_ptr + _DECAY, tl.load(hyper_ptr))
    tl.store(numbers_ptr + _EPS, tl.load(hyper_ptr + 1))
    tl.store(numbers_ptr + _LR, lr)
    tl.store(numbers_ptr + _ALPHA, alpha)
    tl.store(numbers_ptr + _REST, 1.0 - alpha)
    tl.store(numbers_ptr + _MOMENTUM, tl.load(hyper_ptr + 3))


@triton.jit
def _rmsprop_update(p, g, v, a, b, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    g += tl.load(numbers_ptr + _DECAY) * p
    rest = tl.load(numbers_ptr + _REST)
    v += rest * g * g
    variance = v
    if VARIANT == "centered" or VARIANT == "centered momentum":
        a += rest * g
        variance = tl.maximum(v - a * a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    step = g * reciprocal(square_root(variance, PTX) + tl.load(numbers_ptr + _EPS), PTX)
    if VARIANT == "momentum":
        step += a
        a = step
    elif VARIANT == "centered momentum":
        step += b
        b = step
    return p - tl.load(numbers_ptr + _LR) * step, v, a, b


@triton.jit
def _adagrad_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: weight decay, eps, lr_decay."""
    tl.store(numbers_ptr + _DECAY, tl.load(hyper_ptr))
    tl.store(numbers_ptr + _EPS, tl.load(hyper_ptr + 1))
    tl.store(numbers_ptr + _LR, lr / (1.0 + (step - 1.0) * tl.load(hyper_ptr + 2)))


@triton.jit
def _adagrad_update(p, g, v, a, b, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    g += tl.load(numbers_ptr + _DECAY) * p
    v += g * g
    step = g * reciprocal(square_root(v, PTX) + tl.load(numbers_ptr + _EPS), PTX)
    return p - tl.load(numbers_ptr + _LR) * step, v, a, b


@dataclass(frozen=True, kw_only=True)
class RMSprop(Rule):
    """Moments: v, then a if centered, then b if there is momentum."""

    alpha: float
    eps: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    kernels = RuleKernels(_rmsprop_numbers, _rmsprop_update, (3,))

    @property
    def signs(self) -> tuple[bool, ...]:
        return (False, *[True] * self.centered, *[True] * bool(self.momentum))

    @property
    def decays(self) -> tuple[int | None, ...]:
        return (3, *[3] * self.centered, *[5] * bool(self.momentum))

    @property
    def variant(self) -> str:
        return " ".join(["centered"] * self.centered + ["momentum"] * bool(self.momentum)) or "plain"

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, self.eps, self.alpha, self.momentum

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(self.weight_decay, self.eps, lr, self.alpha, 1 - self.alpha, self.momentum)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, eps, lr, alpha, rest, momentum = numbers
        g = g.add_(p, alpha=decay)
        variance = moments[0].mul_(alpha).addcmul_(g, g, value=rest)
        if self.centered:
            mean = moments[1].mul_(alpha).add_(g, alpha=rest)
            variance = (variance - mean * mean).clamp_(min=0)
        step = g / variance.sqrt().add_(eps)
        if self.momentum:
            step = moments[-1].mul_(momentum).add_(step)
        p.sub_(step, alpha=lr)


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """The sum of squares begins at `initial_accumulator_value`."""

    eps: float
    weight_decay: float = 0.0
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0

    kernels = RuleKernels(_adagrad_numbers, _adagrad_update, (None,))

    @property
    def signs(self) -> tuple[bool, ...]:
        return (False,)

    @property
    def initial(self) -> float:
        return self.initial_accumulator_value

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, self.eps, self.lr_decay

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(self.weight_decay, self.eps, lr / (1 + (step - 1) * self.lr_decay))

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, eps, lr = numbers
        g = g.add_(p, alpha=decay)
        p.addcdiv_(g, moments[0].addcmul_(g, g).sqrt().add_(eps), value=-lr)
