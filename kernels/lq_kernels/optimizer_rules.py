"""What an optimizer computes, apart from how its state is kept: the arithmetic of one step on float32 values.

A rule is a frozen dataclass of the hyper-parameters of one param group. Each exists twice: in torch, and as four
functions of a kernel, which get their numbers from device memory, so that one launch serves several param groups and
a captured graph a learning rate that changes.

    numbers   lr and step -> up to 12 float32 for each tensor, computed in float64
    update    weight, gradient, moments, numbers, trust -> weight and moments
    measure   the same without trust -> two values for each element, which are added up over the tensor
    trust     those two sums -> the factor of the tensor's learning rate

In kernels the moments arrive multiplied by the numbers that `decays` names, where the scale of a block is multiplied
by them once for all its values.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lq_kernels._triton import tl, triton

NUMBERS = 12


@dataclass(frozen=True)
class RuleKernels:
    """The functions above for kernels; `measure` and `trust` are None where nothing is measured.

    decays[i] is the index of the number by which moment i arrives multiplied, None for one that arrives as it is.
    """

    numbers: Any
    update: Any
    decays: tuple[int | None, ...] = ()
    measure: Any = None
    trust: Any = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of the rules; `lr` may be a tensor of one element, read on the device that the parameters are on."""

    lr: float | Tensor
    maximize: bool = False

    kernels: ClassVar[RuleKernels]

    @property
    def signs(self) -> tuple[bool, ...]:
        """For each moment whether it has a sign."""
        raise NotImplementedError

    @property
    def variant(self) -> str:
        """What is compiled apart; rules of one variant share a launch."""
        return ""

    @property
    def decays(self) -> tuple[int | None, ...]:
        """`kernels.decays` of the moments that there are."""
        known = self.kernels.decays
        return tuple(known[i] if i < len(known) else None for i in range(len(self.signs)))

    @property
    def measured(self) -> bool:
        """Whether the learning rate of a tensor depends on sums over it."""
        return self.kernels.measure is not None

    @property
    def initial(self) -> float:
        """Of every moment."""
        return 0.0

    def hyper(self) -> tuple[float, ...]:
        """What the kernel's `numbers` reads, in its order."""
        raise NotImplementedError

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        """What `update` reads, in the order of the kernel's."""
        raise NotImplementedError

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        """One step in torch: p and moments change in place, g may."""
        raise NotImplementedError

    def trust(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> float:
        """The factor of the learning rate; p and moments are those before the step."""
        return 1.0


def norm_ratio(numerator: float, denominator: float) -> float:
    """1 where either is zero, so that a tensor of zeros can move."""
    return numerator / denominator if numerator and denominator else 1.0


def norm(x: Tensor) -> float:
    return float(x.square().sum().sqrt())  # sum() adds pairwise, vector_norm in a row


@triton.jit
def number(numbers_ptr, INDEX: tl.constexpr):
    """A float32 that the rule's `numbers` wrote."""
    return tl.load(numbers_ptr + INDEX)


@triton.jit
def write(numbers_ptr, INDEX: tl.constexpr, value):
    tl.store(numbers_ptr + INDEX, value.to(tl.float32))


@triton.jit
def root_ratio(numerator, denominator):
    """`norm_ratio` of two square roots."""
    moved = (numerator > 0) & (denominator > 0)
    return tl.where(moved, tl.sqrt_rn(numerator) / tl.sqrt_rn(tl.where(moved, denominator, 1.0)), 1.0)


def float32(*numbers: float) -> tuple[float, ...]:
    """What is left of each number in float32, as kernels read it."""
    return tuple(torch.tensor(numbers, dtype=torch.float64).float().tolist())
