"""The 8-bit element types against tables of their values, and the GPUs that have them."""

from types import SimpleNamespace

import lq_kernels.element_types as module
import pytest
import torch
from hostile import to_device
from lq_kernels.element_types import E4M3, E5M2, ELEMENT_TYPES, INT8, ElementType, require_element_type
from lq_kernels.rowwise import quantize_rowwise
from samples_rowwise import fp8_ties
from torch import Tensor

FP8 = [E4M3, E5M2]


def values_of(element: ElementType) -> Tensor:
    """The finite values of fp8 by their code, worked out from sign, exponent and mantissa."""
    code = torch.arange(256)
    mantissa_bits = element.mantissa
    exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    bias = {3: 7, 2: 15}[mantissa_bits]
    fraction = mantissa.double() / (1 << mantissa_bits)
    value = torch.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * torch.exp2(exponent.double() - bias)
    )
    value = torch.where(value > element.largest, float("nan"), value)
    return torch.where(code >= 128, -value, value)


def nearest_code(x: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest value, an even one where two are as near; x and values float64, the values by code."""
    distance = (x[:, None] - values.nan_to_num(nan=float("inf"))).abs()
    distance[:, 128] = float("inf")  # -0 is told from 0 by the sign below
    best = distance == distance.amin(1, keepdim=True)
    even = best & (torch.arange(256) % 2 == 0)
    code = torch.where(even.any(1), even.int().argmax(1), best.int().argmax(1))
    return torch.where((code == 0) & torch.signbit(x), 128, code)


@pytest.mark.parametrize("element", FP8, ids=lambda element: str(element.dtype))
def test_facts_are_those_of_the_format(element: ElementType) -> None:
    values = values_of(element)
    assert values[values.isfinite()].amax() == element.largest == torch.finfo(element.dtype).max
    assert torch.finfo(element.dtype).smallest_normal == element.smallest_normal
    decoded = torch.arange(256, dtype=torch.uint8).view(element.dtype).double()
    torch.testing.assert_close(decoded.where(decoded.isfinite(), torch.nan), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "launcher"])
@pytest.mark.parametrize("element", FP8, ids=lambda element: str(element.dtype))
def test_codes_are_the_nearest_of_the_table(element: ElementType, backend: str, device: torch.device) -> None:
    x = torch.cat([fp8_ties(element.dtype), torch.randn(4, 500) * torch.exp2(torch.randint(-18, 8, (4, 500)))], dim=1)
    x = x.clamp(-element.largest, element.largest)
    quantize = getattr(quantize_rowwise, backend)
    codes, scale = quantize(to_device(x, device), element.dtype)
    assert (scale == 1).all()
    expected = nearest_code(x.double().flatten(), values_of(element))
    torch.testing.assert_close(codes.cpu().view(torch.uint8).flatten().long(), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("element", FP8, ids=lambda element: str(element.dtype))
def test_a_gpu_rounds_every_bfloat16_as_the_reference_does(element: ElementType) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.abs() <= element.largest].view(1, -1)
    x[0, 0] = element.largest
    codes, _ = quantize_rowwise(x.cuda(), element.dtype)
    assert torch.equal(codes.cpu().view(torch.uint8), quantize_rowwise(x, element.dtype)[0].view(torch.uint8))


@pytest.mark.parametrize("element", ELEMENT_TYPES.values(), ids=lambda element: str(element.dtype))
def test_no_code_of_a_kept_row_depends_on_subnormal_values(element: ElementType) -> None:
    subnormal = torch.nextafter(torch.tensor(2.0**-126), torch.tensor(0.0))
    row = torch.stack([torch.tensor(element.smallest_amax), subnormal])[None]
    codes, scale = quantize_rowwise(row, element.dtype)
    assert codes.float().tolist() == [[element.largest, 0]]
    assert scale.item() == torch.tensor(element.smallest_amax / element.largest).item() >= 2.0**-126
    below = torch.nextafter(row[:, :1], row[:, :1] * 0)
    assert quantize_rowwise(below, element.dtype)[1].item() == 0


def test_the_limits_named_in_the_documentation() -> None:
    assert [element.smallest_amax for element in (INT8, E4M3, E5M2)] == [2.0**-118, 2.0**-107, 2.0**-93]


class _Driver:
    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = SimpleNamespace(backend=backend, arch=arch)

    def get_current_target(self) -> SimpleNamespace:
        return self.target


@pytest.mark.parametrize(
    ("backend", "arch", "missing"),
    [
        ("cuda", 80, "sm_80 has no fp8"),
        ("cuda", 86, "sm_86 has no fp8"),
        ("cuda", 89, ""),
        ("cuda", 90, ""),
        ("cuda", 103, ""),
        ("hip", "gfx90a", "gfx90a"),
        ("hip", "gfx942", "fnuz"),
        ("hip", "gfx950", ""),
    ],
)
def test_a_gpu_without_these_fp8_types_is_an_error(
    backend: str, arch: int | str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.triton.runtime, "driver", SimpleNamespace(active=_Driver(backend, arch)))
    require_element_type(torch.int8, torch.device("cuda"), "an_op")
    require_element_type(torch.float8_e5m2, torch.device("cpu"), "an_op")
    for element in FP8:
        if missing:
            with pytest.raises(RuntimeError, match=f"an_op got {element.dtype}.*{missing}"):
                require_element_type(element.dtype, torch.device("cuda"), "an_op")
        else:
            require_element_type(element.dtype, torch.device("cuda"), "an_op")
