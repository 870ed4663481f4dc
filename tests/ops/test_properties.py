"""Kernels against references on arguments that nobody thought of: values, shapes and places in memory are drawn.

Hypothesis draws the same examples in every run. Arguments of an op begin as one of its samples, so that they fit
together; then the first tensor gets new values and, where nothing else depends on it, another shape, and every tensor
another place in memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hostile import FLOATS, cut_out
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lq_kernels._op import OPS
from samples_scaled_mm import product
from test_parity import BOUNDS, assert_within, copied, results, samples
from torch import Tensor

pytestmark = pytest.mark.thorough

Arguments = tuple[Any, ...]

EXAMPLES = 10  # for each op, of one to sixty programs at a millisecond each
LARGEST = 4096  # values of a sample that is drawn from
MOVABLE = (*FLOATS, torch.int8, torch.uint8, torch.int32)

every_run_the_same = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # what fails says its shapes and strides; a smaller one takes minutes to find
    suppress_health_check=list(HealthCheck),
    max_examples=EXAMPLES,
)
places = st.sampled_from(["as it is", "contiguous", "rows", "columns", "every_other"])


@dataclass(frozen=True)
class Drawn:
    """Arguments, printed by types, shapes and strides when a property fails."""

    args: Arguments
    values: str

    def __repr__(self) -> str:
        words = [
            f"{arg.dtype} {tuple(arg.shape)} strides {arg.stride()}" if isinstance(arg, Tensor) else repr(arg)
            for arg in self.args
        ]
        return f"{self.values} values: {', '.join(words)}"


def normal(shape: torch.Size) -> Tensor:
    return torch.randn(shape)


def sparse(shape: torch.Size) -> Tensor:
    return torch.randn(shape) * (torch.rand(shape) < 0.1)


def halves(shape: torch.Size) -> Tensor:
    """Whole and half numbers, and zeros of both signs: ties where the scale is a power of two."""
    return torch.randint(-254, 255, shape) / -2


def outliers(shape: torch.Size) -> Tensor:
    return torch.randn(shape) * torch.where(torch.rand(shape) < 0.02, 1000, 1)


def zeros(shape: torch.Size) -> Tensor:
    return torch.zeros(shape)


def spread(shape: torch.Size) -> Tensor:
    """Magnitudes over the whole range of float32, from subnormal to infinite."""
    return torch.randn(shape) * torch.exp2(torch.randint(-150, 128, shape))


def not_finite(shape: torch.Size) -> Tensor:
    """One NaN or infinity."""
    values = torch.randn(shape)
    values.view(-1)[torch.randint(values.numel(), ())] = torch.tensor([torch.nan, torch.inf, -torch.inf])[
        torch.randint(3, ())
    ]
    return values


MILD = (normal, sparse, halves, outliers, zeros)
WILD = (*MILD, spread, not_finite)  # where sums overflow, their order shows: not for ops with a bound


@functools.cache
def small_samples(name: str) -> list[Arguments]:
    """Samples with few values in each tensor and none of them empty."""
    return [
        args for args in samples(name).values() if all(0 < tensor.numel() <= LARGEST for tensor in tensors_in(args))
    ]


def tensors_in(args: Arguments) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


@functools.cache
def takes_any_shape(name: str) -> bool:
    """Whether the other tensors stay the same over samples of different shapes: a code book, not scales of rows."""
    by_others: dict[str, set[torch.Size]] = {}
    for args in small_samples(name):
        first, *others = tensors_in(args)
        by_others.setdefault(str([other.shape for other in others]), set()).add(first.shape)
    return not OPS[name].outputs and max(map(len, by_others.values())) > 3


def moved(tensor: Tensor, place: str) -> Tensor:
    """A copy elsewhere, of other strides."""
    if place == "as it is":
        return tensor
    if place == "contiguous" or tensor.ndim not in (1, 2) or tensor.dtype not in MOVABLE:
        return tensor.contiguous()
    if tensor.ndim == 1:
        return cut_out(tensor[None], "every_other" if place == "every_other" else "rows")[0]
    return cut_out(tensor, place)


@st.composite
def drawn(draw: st.DrawFn, name: str) -> Drawn:
    """Arguments of the op `name`."""
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    if name == "scaled_mm":
        M, K, N = (draw(st.integers(1, 70)) for _ in range(3))
        args, values = product(M, K, N, draw(st.sampled_from(FLOATS))), "random"
    else:
        first, *rest = draw(st.sampled_from(small_samples(name)))
        shape = draw(shapes(first.ndim)) if takes_any_shape(name) else first.shape
        if first.is_floating_point() and first.element_size() > 1:
            of_shape = draw(st.sampled_from(MILD if name in BOUNDS else WILD))
            args, values = (of_shape(shape).to(first.dtype), *rest), of_shape.__name__
        else:
            args, values = (shuffled(first, shape), *rest), "shuffled"
    written = OPS[name].written(*args) if OPS[name].outputs else ()
    fixed = [not isinstance(arg, Tensor) or any(arg is out for out in written) for arg in args]
    return Drawn(
        tuple(arg if stays else moved(arg, draw(places)) for arg, stays in zip(args, fixed, strict=True)), values
    )


@st.composite
def shapes(draw: st.DrawFn, dimensions: int) -> torch.Size:
    most = (3,) * max(dimensions - 2, 0) + (40, 300)[-dimensions or 2 :]
    return torch.Size(draw(st.integers(1, size)) for size in most)


def shuffled(codes: Tensor, shape: torch.Size) -> Tensor:
    """Codes that are there already, as many as `shape` needs."""
    known = codes.contiguous().view(-1).view(torch.uint8) if codes.element_size() == 1 else codes.reshape(-1)
    return known[torch.randint(known.numel(), shape)].view(codes.dtype)


def results_or_error(name: str, function: Any, args: Arguments) -> tuple[Tensor, ...] | type[Exception]:
    try:
        return results(OPS[name], function, args)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error)


@pytest.mark.parametrize("name", sorted(OPS))
def test_kernel_agrees_with_the_reference_on_any_arguments(name: str, device: torch.device) -> None:
    """To the bit, or within the op's bound; and what the one refuses the other refuses."""

    @every_run_the_same
    @given(drawn(name))
    def agrees(arguments: Drawn) -> None:
        op, args = OPS[name], arguments.args
        expected = results_or_error(name, op.reference, copied(args, torch.device("cpu")))
        got = results_or_error(name, op.launcher, copied(args, device))
        if isinstance(expected, type) or isinstance(got, type):
            assert got == expected
            return
        bound = BOUNDS[name](*args) if name in BOUNDS else None
        for value, reference in zip(got, expected, strict=True):
            if bound is None:
                torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=0, equal_nan=True)
            else:
                assert_within(value.cpu(), reference, bound)

    agrees()
