"""One thing to measure, and how: parity first, then the time of ours and of others on the same inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lq_plugin.recipes.benchmarks.records import Result
from lq_plugin.recipes.benchmarks.timing import Call, Ceilings, Stopwatch

Inputs = tuple[Any, ...]
Outputs = Any  # a tensor or several

CHECKED = 64  # rows, or columns, at each end


@dataclass(frozen=True)
class Case:
    """`make` gives a set of random inputs, `ours` and each of `peers` take it; a peer returns the call to be timed.

    `check` takes inputs and what `ours` gave for them, and raises AssertionError where the reference gives something
    else. `bytes` and `operations` are the fewest that the work needs; `bits` those of an operand of the product.
    """

    name: str
    op: str
    shape: str
    dtype: str
    make: Callable[[], Inputs]
    ours: Callable[..., Outputs]
    check: Callable[[Inputs, Outputs], None]
    bytes: int
    operations: int = 0
    bits: int = 16
    peers: Mapping[str, Callable[..., Call]] = field(default_factory=dict)


def measure(case: Case, watch: Stopwatch, ceilings: Ceilings) -> Result:
    """A result with times, or with the problem that kept them away."""
    result = Result(case.name, case.op, case.shape, case.dtype, case.bytes, case.operations)
    problems: dict[str, str] = {}
    with told_in(problems, "ours"):
        inputs = [case.make() for _ in range(watch.sets_of(case.bytes))]
        check_parity(case, inputs[0])
        timing = watch.time([lambda one=one: case.ours(*one) for one in inputs])  # type: ignore[misc]
        result = replace(result, ms=timing.ms, spread=timing.spread)
    if watch.device.type == "cuda":  # a reference on a CPU is not held against anything
        result = replace(result, floor_ms=ceilings.floor_ms(case.bytes, case.operations, case.bits))
    if "ours" in problems:
        return replace(result, problem=problems["ours"])
    for peer, prepare in case.peers.items():
        with told_in(problems, peer):
            result.peers[peer] = watch.time([prepare(*one) for one in inputs]).ms
    return replace(result, peer_problems=problems)


def of_ceilings(ceilings: Ceilings) -> Iterator[Result]:
    """The two measurements that every share is a share of."""
    copied, side, copy, product = ceilings.copied, ceilings.side, ceilings.copy, ceilings.product
    yield Result("copy", "torch copy_", f"{copied} bytes", "uint8", copied, 0, copy.ms, copy.spread, copy.ms)
    size, operations = 3 * 2 * side**2, 2 * side**3
    yield Result(
        "bf16",
        "torch mm",
        f"{side} x {side} x {side}",
        "bf16",
        size,
        operations,
        product.ms,
        product.spread,
        product.ms,
    )


@contextmanager
def told_in(problems: dict[str, str], who: str) -> Iterator[None]:
    """Writes down an exception, of whatever kind: the record names it, and other cases are measured all the same."""
    try:
        yield
    except Exception as error:
        problems[who] = " ".join(f"{type(error).__name__}: {error}".split())[:300]


def check_parity(case: Case, inputs: Inputs) -> None:
    """Checks a result whose memory was all ones before: what a kernel leaves out cannot be right by chance."""
    poisoned = case.ours(*inputs)
    for output in (poisoned,) if isinstance(poisoned, Tensor) else poisoned:
        output.reshape(-1).view(torch.uint8).fill_(255)
    del poisoned  # its memory is what the allocator gives next
    case.check(inputs, case.ours(*inputs))


def assert_equal(got: Tensor, expected: Tensor) -> None:
    """To the bit, wherever the two are."""
    got, expected = got.cpu(), expected.cpu()
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (got.shape, expected.shape, got.dtype)
    different = got.reshape(-1).view(torch.uint8) != expected.reshape(-1).view(torch.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} bytes differ from the reference's"


def assert_close(got: Tensor, expected: Tensor, relative: float) -> None:
    """||got - expected|| <= relative * ||expected||, and every value finite."""
    got, expected = got.cpu().double(), expected.cpu().double()
    error = float((got - expected).norm() / expected.norm())
    assert error <= relative, f"the relative error is {error:.2e}, at most {relative:.2e} was expected"


def ends(size: int) -> tuple[slice, slice]:
    """The first and the last so many of `size`: where a kernel goes wrong if it does."""
    few = min(CHECKED, size)
    return slice(0, few), slice(size - few, size)


def normal(device: torch.device, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
