"""Every launcher gives the bits of its reference, on the samples of op_samples.py."""

import functools
import importlib
import pkgutil
from typing import Any

import lq_kernels
import pytest
import torch
from op_samples import SAMPLES, to_device
from torch import Tensor

for module in pkgutil.iter_modules(lq_kernels.__path__):
    importlib.import_module(f"lq_kernels.{module.name}")

from lq_kernels._op import OPS  # noqa: E402 - full only once every module is imported


@functools.cache
def samples(name: str) -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    return dict(SAMPLES[name]())


def sample_names() -> list[tuple[str, str]]:
    return [(op, sample) for op in SAMPLES for sample in samples(op)]


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def test_every_op_has_samples_and_a_launcher() -> None:
    assert set(SAMPLES) == set(OPS)
    assert [op for op in OPS.values() if op.launcher is None] == []


@pytest.mark.parametrize(("name", "sample"), sample_names())
def test_kernel_gives_the_bits_of_the_reference(name: str, sample: str, device: torch.device) -> None:
    args = samples(name)[sample]
    launcher = OPS[name].launcher
    assert launcher is not None
    got = launcher(*(to_device(arg, device) for arg in args))
    expected = OPS[name].reference(*args)
    for value, reference in zip(tensors(got), tensors(expected), strict=True):
        assert value.stride() == reference.stride()
        torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_fake_and_schema_agree_with_the_op(name: str, device: torch.device) -> None:
    for args in list(samples(name).values())[::3]:
        # opcheck compares without equal_nan
        if all(value.isfinite().all() for value in tensors(OPS[name].reference(*args))):
            torch.library.opcheck(OPS[name].overload, tuple(to_device(arg, device) for arg in args))
