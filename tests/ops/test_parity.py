"""Every launcher gives the bits of its reference, on the samples of op_samples.py."""

import functools
import importlib
import pkgutil
from typing import Any

import lq_kernels
import pytest
import torch
from hostile import to_device
from op_samples import BOUNDS, SAMPLES
from torch import Tensor

for module in pkgutil.iter_modules(lq_kernels.__path__):
    importlib.import_module(f"lq_kernels.{module.name}")

from lq_kernels._op import OPS, Op  # noqa: E402 - full only once every module is imported


@functools.cache
def samples(name: str) -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    return dict(SAMPLES[name]())


QUICK = 3  # samples of each op in `make check`


def sample_names() -> list[Any]:
    return [
        pytest.param(op, sample, marks=[pytest.mark.thorough] if number >= QUICK else [])
        for op in SAMPLES
        for number, sample in enumerate(samples(op))
    ]


def tensors(result: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result or ()


def results(op: Op[Any, Any], function: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What the op returns, and what it wrote into its arguments."""
    returned = tensors(function(*args))
    return returned + (op.written(*args) if op.outputs else ())


def test_every_op_has_samples_and_a_launcher() -> None:
    assert set(SAMPLES) == set(OPS)
    assert [op for op in OPS.values() if op.launcher is None] == []


@pytest.mark.parametrize(("name", "sample"), sample_names())
def test_kernel_gives_the_bits_of_the_reference(name: str, sample: str, device: torch.device) -> None:
    op, args = OPS[name], samples(name)[sample]
    on_device = copied(args, device)
    got = results(op, op.launcher, on_device)
    expected = results(op, op.reference, copied(args, torch.device("cpu")))
    bound = BOUNDS[name](*args) if name in BOUNDS else None
    for value, reference in zip(got, expected, strict=True):
        assert value.stride() == reference.stride()
        if bound is None:
            torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=0, equal_nan=True)
        else:
            assert_within(value.cpu(), reference, bound)


def copied(args: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The arguments on `device`, in memory of their own, since some are written."""
    return tuple(to_device(arg, device) for arg in args)


def assert_within(value: Tensor, reference: Tensor, bound: Tensor) -> None:
    assert value.dtype == reference.dtype
    finite = reference.isfinite()
    torch.testing.assert_close(value[~finite], reference[~finite], rtol=0, atol=0, equal_nan=True)
    difference = (value.double() - reference.double()).abs()
    assert bool((difference <= bound)[finite].all()), f"off by {(difference / bound)[finite].max()} of the bound"


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(SAMPLES))
def test_fake_and_schema_agree_with_the_op(name: str, device: torch.device) -> None:
    for args in list(samples(name).values())[::3]:
        # opcheck compares without equal_nan
        expected = results(OPS[name], OPS[name].reference, copied(args, torch.device("cpu")))
        if all(value.isfinite().all() for value in expected):
            torch.library.opcheck(OPS[name].overload, copied(args, device))
