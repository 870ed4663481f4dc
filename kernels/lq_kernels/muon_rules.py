"""The two elementwise parts of Muon, before and after the orthogonalisation of the direction.

    direction   m <- momentum m + (1 - momentum) g;  d = m, with Nesterov d = (1 - momentum) g + momentum m
    weight      p <- p (1 - lr wd) - lr ratio o, where o is the orthogonalised d

The first writes d over the weight of its batch, which is memory for directions; the second reads o as its gradient.
Sources: torch.optim.Muon, https://kellerjordan.github.io/posts/muon/
"""

from dataclasses import dataclass

from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.optimizer_rules import Rule, RuleKernels, float32, number, write

_MOMENTUM, _REST = map(tl.constexpr, range(2))
_KEPT, _LR = map(tl.constexpr, range(2))


@triton.jit
def _direction_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: the momentum."""
    momentum = tl.load(hyper_ptr)
    write(numbers_ptr, _MOMENTUM, momentum)
    write(numbers_ptr, _REST, 1.0 - momentum)


@triton.jit
def _direction_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    g *= number(numbers_ptr, _REST)
    m += g  # arrives times the momentum
    return g + number(numbers_ptr, _MOMENTUM) * m if VARIANT == "nesterov" else m, m, v, s


@triton.jit
def _weight_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters: weight decay, ratio."""
    write(numbers_ptr, _KEPT, 1.0 - lr * tl.load(hyper_ptr))
    write(numbers_ptr, _LR, lr * tl.load(hyper_ptr + 1))


@triton.jit
def _weight_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    moved = p * number(numbers_ptr, _KEPT) - number(numbers_ptr, _LR) * g
    return tl.where(g == g, moved, p) if VARIANT == "skips" else moved, m, v, s


@dataclass(frozen=True, kw_only=True)
class MuonDirection(Rule):
    """What is orthogonalised; the momentum is an average, as in torch."""

    momentum: float
    nesterov: bool = True

    kernels = RuleKernels(_direction_numbers, _direction_update, (0,))

    @property
    def signs(self) -> tuple[bool, ...]:
        return (True,)

    @property
    def variant(self) -> str:
        return "nesterov" if self.nesterov else "plain"

    def hyper(self) -> tuple[float, ...]:
        return (self.momentum,)

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(self.momentum, 1 - self.momentum)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        momentum, rest = numbers
        moments[0].lerp_(g, rest)  # as torch: directions that differ in one rounding are orthogonalised differently
        p.copy_(g.lerp_(moments[0], momentum) if self.nesterov else moments[0])


@dataclass(frozen=True, kw_only=True)
class MuonWeight(Rule):
    """`ratio` adjusts the learning rate to the shape; `skips` leaves weights alone whose direction is NaN."""

    weight_decay: float
    ratio: float
    skips: bool = False

    kernels = RuleKernels(_weight_numbers, _weight_update, ())

    @property
    def signs(self) -> tuple[bool, ...]:
        return ()

    @property
    def variant(self) -> str:
        return "skips" if self.skips else "plain"

    def hyper(self) -> tuple[float, ...]:
        return self.weight_decay, self.ratio

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        return float32(1 - lr * self.weight_decay, lr * self.ratio)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        kept, lr = numbers
        moved = (p * kept).sub_(g, alpha=lr)
        p.copy_(moved.where(~g.isnan(), p) if self.skips else moved)
