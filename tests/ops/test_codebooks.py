"""Code books against published values and bitsandbytes' own functions."""

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lq_kernels.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dynamic_map,
    four_bit_map,
    midpoints,
    zero_code,
)
from torch import Tensor

# Of bitsandbytes' create_dynamic_map(signed=True) and (signed=False).
SIGNED = {0: -0.99296874, 63: -0.10703126, 64: -0.09859375, 126: -5.5e-7, 127: 0.0, 128: 5.5e-7, 129: 3.25e-6}
SIGNED |= {130: 7.75e-6, 131: 2.125e-5, 132: 4.375e-5, 133: 6.625e-5, 134: 8.875e-5, 190: 0.09859375}
SIGNED |= {191: 0.10703126, 192: 0.12109375, 254: 0.99296874, 255: 1.0}
UNSIGNED = {0: 0.0, 1: 3.25e-7, 2: 7.75e-7, 3: 2.125e-6, 4: 4.375e-6, 126: 0.0992969, 127: 0.1035156}
UNSIGNED |= {128: 0.1105469, 254: 0.9964844, 255: 1.0}
E4M3 = {129: 1.0172527e-6, 135: 7.1207683e-6, 136: 3.2552085e-5, 137: 3.6621095e-5, 143: 6.1035156e-5}
E4M3 |= {0: -1.0, 127: 0.0, 128: 0.0, 144: 6.510417e-5, 254: 0.93333334, 255: 1.0}
E5M2 = {0: -1.0, 127: 0.0, 128: 0.0, 129: 3.326152e-11, 130: 6.652304e-11, 132: 5.3218435e-10, 254: 0.85714287}

GOLDEN: dict[str, tuple[Tensor, dict[int, float], float]] = {
    "signed dynamic": (create_dynamic_map(), SIGNED, 75.105263),  # the last number: the sum of all magnitudes
    "unsigned dynamic": (create_dynamic_map(signed=False), UNSIGNED, 75.105263),
    "e4m3": (create_fp8_map(True, 4, 3), E4M3, 24.5326421),
    "e5m2": (create_fp8_map(), E5M2, 12.5714288),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_maps_have_the_published_values(name: str) -> None:
    code, golden, total = GOLDEN[name]
    torch.testing.assert_close(code[list(golden)], torch.tensor(list(golden.values())), rtol=1e-6, atol=0)
    assert code.double().abs().sum().item() == pytest.approx(total, rel=1e-6)


def test_the_named_maps_are_the_dynamic_ones() -> None:
    assert torch.equal(dynamic_map("dynamic"), create_dynamic_map())
    assert torch.equal(dynamic_map("dynamic_unsigned"), create_dynamic_map(signed=False))


def test_the_symmetric_map_differs_in_its_first_value_only() -> None:
    assert dynamic_map("dynamic_symmetric")[0] == -1
    assert torch.equal(dynamic_map("dynamic_symmetric")[1:], dynamic_map("dynamic")[1:])


@pytest.mark.parametrize(("name", "zero"), [("dynamic", 127), ("dynamic_symmetric", 127), ("dynamic_unsigned", 0)])
def test_dynamic_maps_ascend_and_have_one_zero(name: str, zero: int) -> None:
    assert (dynamic_map(name).diff() > 0).all()
    assert zero_code(name) == zero


def test_an_unknown_map_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'linear'; known: dynamic, dynamic_symmetric, dynamic_unsigned"):
        dynamic_map("linear")
    with pytest.raises(ValueError, match="'int4'; known: nf4, fp4"):
        four_bit_map("int4")


def test_midpoints_lie_halfway() -> None:
    assert midpoints(torch.tensor([-1.0, 0.0, 0.5, 0.5])).tolist() == [-0.5, 0.25, 0.5]


def test_nf4_has_the_bits_of_the_published_table() -> None:
    nf4 = four_bit_map("nf4")
    assert nf4[[0, 1, 7, 8, 15]].tolist() == [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534, 1.0]
    assert (nf4.diff() > 0).all()
    made = create_normal_map()
    torch.testing.assert_close(torch.cat([made[:8], made[-8:]]), nf4, rtol=0, atol=1.2e-7)


def test_fp4_counts_in_twelfths_and_keeps_the_sign_in_its_highest_bit() -> None:
    fp4 = four_bit_map("fp4")
    assert fp4[:8].tolist() == torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]).div(12).tolist()
    assert torch.equal(fp4[8:], -fp4[:8])
    assert fp4[8].signbit()


@pytest.mark.parametrize("bits", range(2, 9))
def test_maps_of_few_bits_are_filled_up_with_zeros(bits: int) -> None:
    assert len(create_dynamic_map(True, bits, bits).unique()) == 1 << bits
    assert len(create_linear_map(True, bits).unique()) == (1 << bits) - 1
    assert len(create_linear_map(False, bits).unique()) == 1 << bits
    for code in (create_dynamic_map(True, bits, bits), create_linear_map(True, bits), create_linear_map(False, bits)):
        assert code.shape == (256,)
        assert (code.diff() >= 0).all()


def test_two_bits_have_these_values() -> None:
    assert create_dynamic_map(True, 2, 2).unique().tolist() == pytest.approx([-0.55, 0, 0.55, 1])


def test_a_linear_map_without_a_zero_has_256_steps() -> None:
    steps = create_linear_map(add_zero=False).double().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 2 / 255), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: create_dynamic_map(True, 7, 9), "total_bits=9 and max_exponent_bits=7 has 512"),
        (lambda: create_dynamic_map(False, 8, 8), "max_exponent_bits=8 has 257 .* unsigned map one exponent bit less"),
        (lambda: create_fp8_map(True, 5, 3), r"total_bits=8, .* got 1 \+ 5 \+ 3"),
        (lambda: create_fp8_map(False, 0, 8), "at least one exponent bit"),
        (lambda: create_linear_map(total_bits=9), "2 to 8 bits, got total_bits=9"),
    ],
)
def test_bits_that_make_no_map_are_named(create: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create()


ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "create_dynamic_map": [
        *itertools.product([True], range(1, 10), range(2, 9)),
        *((False, bits - 1, bits) for bits in range(2, 9)),
    ],
    "create_fp8_map": [
        (signed, exponent, bits - exponent - signed, bits)
        for signed, bits in itertools.product([True, False], range(2, 9))
        for exponent in range(1, min(bits - signed, 7) + 1)  # bitsandbytes overflows with 8
    ],
    "create_linear_map": [(), *itertools.product([True, False], range(2, 9), [True, False])],
    "create_normal_map": [(), (0.9677083, False), (0.99,)],
}
CREATE = {f.__name__: f for f in (create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map)}


@pytest.mark.parametrize("name", list(CREATE))
def test_maps_are_those_of_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the roundings that it makes on the way; and it leaves some linear maps unsorted."""
    theirs = getattr(pytest.importorskip("bitsandbytes.functional"), name)
    stats = ModuleType("scipy.stats")
    stats.norm = SimpleNamespace(ppf=lambda q: torch.special.ndtri(torch.as_tensor(q).double()).numpy())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scipy", ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.stats", stats)
    for arguments in ARGUMENTS[name]:
        expected = theirs(*arguments).sort().values
        exact = name == "create_fp8_map"
        atol, rtol = (0.0, 0.0) if exact else (1.2e-7, 0.0) if name != "create_dynamic_map" else (0.0, 1.5e-7)
        torch.testing.assert_close(CREATE[name](*arguments), expected, rtol=rtol, atol=atol)
