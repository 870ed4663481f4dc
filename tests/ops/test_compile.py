"""Every op under torch.compile gives the bits that it gives in eager, without a graph break."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lq_kernels._op import OPS, Op
from test_parity import copied, samples, tensors
from torch import Tensor

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")

Arguments = tuple[Any, ...]


def shapes(args: Arguments) -> list[torch.Size]:
    return [arg.shape for arg in args if isinstance(arg, Tensor)]


def two_samples(name: str) -> list[Arguments]:
    """One without sizes of 0, with as few of 1 as can be, and one that differs from it in its sizes alone, if any."""
    present = [args for args in samples(name).values() if not any(0 in shape for shape in shapes(args))]
    first = min(present, key=lambda args: sum(shape.count(1) for shape in shapes(args)))
    others = [
        args for args in present if shapes(args) != shapes(first) and list(map(kind, args)) == list(map(kind, first))
    ]
    return [first, *others[:1]]


def kind(arg: Any) -> Any:
    """What torch.compile may expect to stay the same: a value; of a tensor the type, and sizes and strides below 2."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.is_contiguous(), [min(number, 2) for number in (*arg.shape, *arg.stride())]
    return arg


def in_a_model(op: Op[Any, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The op and torch behind it: copies of what it returns and of what it writes."""
    names = list(inspect.signature(op.reference).parameters)
    written = [names.index(output) for output in op.outputs]

    def model(*args: Any) -> tuple[Tensor, ...]:
        returned = tensors(op(*args))
        return tuple(value.clone() for value in (*returned, *(args[i] for i in written)))

    return model


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, reference in zip(got, expected, strict=True):
        assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
        assert torch.equal(value.reshape(-1).view(torch.uint8), reference.reshape(-1).view(torch.uint8))


def compare(name: str, device: torch.device, **how: Any) -> None:
    torch._dynamo.reset()
    model = in_a_model(OPS[name])
    compiled = torch.compile(model, fullgraph=True, **how)
    for args in two_samples(name):
        assert_same_bits(compiled(*copied(args, device)), model(*copied(args, device)))


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_compiled_op_gives_what_it_gives_in_eager(name: str) -> None:
    compare(name, CPU, backend="aot_eager", dynamic=False)


def sizes_by_tensors(name: str) -> bool:
    """Whether no argument is a number, which torch.compile would take as a size that may change."""
    return not any(type(arg) is int for args in two_samples(name) for arg in args)


@pytest.mark.parametrize("name", sorted(filter(sizes_by_tensors, OPS)))
def test_an_op_compiled_once_takes_other_sizes(name: str) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(name, CPU, backend="aot_eager", dynamic=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(OPS))
def test_inductor_gives_what_eager_gives(name: str) -> None:
    compare(name, torch.device("cuda"), backend="inductor")
