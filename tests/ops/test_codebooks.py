"""The dynamic maps against published values, and nearest codes against a search over all midpoints."""

import pytest
import torch
from lq_kernels.codebooks import NearestTable, dynamic_map, midpoints, zero_code
from torch import Tensor

NAMES = ["dynamic", "dynamic_symmetric", "dynamic_unsigned"]

# Of bitsandbytes' create_dynamic_map(signed=True) and (signed=False).
SIGNED = {0: -0.99296874, 63: -0.10703126, 64: -0.09859375, 126: -5.5e-7, 127: 0.0, 128: 5.5e-7, 129: 3.25e-6}
SIGNED |= {130: 7.75e-6, 131: 2.125e-5, 132: 4.375e-5, 133: 6.625e-5, 134: 8.875e-5, 190: 0.09859375}
SIGNED |= {191: 0.10703126, 192: 0.12109375, 254: 0.99296874, 255: 1.0}
UNSIGNED = {0: 0.0, 1: 3.25e-7, 2: 7.75e-7, 3: 2.125e-6, 4: 4.375e-6, 126: 0.0992969, 127: 0.1035156}
UNSIGNED |= {128: 0.1105469, 254: 0.9964844, 255: 1.0}


@pytest.mark.parametrize(
    ("name", "golden", "total"), [("dynamic", SIGNED, 1.0), ("dynamic_unsigned", UNSIGNED, 75.105263)]
)
def test_maps_have_the_published_values(name: str, golden: dict[int, float], total: float) -> None:
    code = dynamic_map(name)
    assert code.shape == (256,)
    assert code.dtype == torch.float32
    torch.testing.assert_close(code[list(golden)], torch.tensor(list(golden.values())), rtol=1e-6, atol=0)
    assert code.double().sum().item() == pytest.approx(total, rel=1e-6)


def test_the_symmetric_map_differs_in_its_first_value_only() -> None:
    assert dynamic_map("dynamic_symmetric")[0] == -1
    assert torch.equal(dynamic_map("dynamic_symmetric")[1:], dynamic_map("dynamic")[1:])


@pytest.mark.parametrize(("name", "zero"), [("dynamic", 127), ("dynamic_symmetric", 127), ("dynamic_unsigned", 0)])
def test_maps_ascend_and_have_one_zero(name: str, zero: int) -> None:
    assert (dynamic_map(name).diff() > 0).all()
    assert zero_code(name) == zero


def test_an_unknown_map_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'linear'; known: dynamic, dynamic_symmetric, dynamic_unsigned"):
        dynamic_map("linear")


def test_nearest_codes_have_the_published_values() -> None:
    values = [0, 1e-9, 1e-7, -1e-7, 3e-6, 5e-6, 1e-5, 1.2e-5, 2e-5, 3e-5, 1, -0.0, 2e-6, 1e-6, 4e-5]
    codes = [127, 127, 127, 127, 129, 129, 130, 130, 131, 131, 255, 127, 129, 128, 132]
    for name in ("dynamic", "dynamic_symmetric"):
        assert NearestTable.of(dynamic_map(name)).nearest(torch.tensor(values)).tolist() == codes


def around_every_bucket() -> Tensor:
    """The ends of all buckets of the upper 16 bits, and values inside."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.cat([torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]), torch.randint(1 << 16, (2,))]).int()
    values = (upper[:, None] | lower).view(torch.float32)
    return values[values.isfinite()]


def around_every_midpoint(code: Tensor) -> Tensor:
    bounds = midpoints(code)
    return torch.cat([bounds, torch.nextafter(bounds, bounds + 1), torch.nextafter(bounds, bounds - 1)])


@pytest.mark.parametrize("name", NAMES)
def test_the_table_gives_the_code_of_a_full_search(name: str) -> None:
    code = dynamic_map(name)
    values = torch.cat([around_every_bucket(), around_every_midpoint(code), torch.randn(10000)])
    table = NearestTable.of(code)
    assert table.comparisons == 1
    assert torch.equal(table.nearest(values).long(), torch.searchsorted(midpoints(code), values))


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_map_has_its_own_code_and_ties_go_down(name: str) -> None:
    code = dynamic_map(name)
    table = NearestTable.of(code)
    assert table.nearest(code).tolist() == list(range(256))
    assert table.nearest(midpoints(code)).tolist() == list(range(255))


def test_a_table_of_any_code_gives_the_code_of_a_full_search() -> None:
    dense = torch.cat([torch.linspace(0.5, 0.501, 128), torch.randn(128)]).sort().values
    values = torch.cat([around_every_bucket(), around_every_midpoint(dense)])
    assert torch.equal(NearestTable.of(dense).nearest(values).long(), torch.searchsorted(midpoints(dense), values))


def test_infinities_get_the_ends_and_nan_the_first_code() -> None:
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    assert NearestTable.of(dynamic_map("dynamic")).nearest(values).tolist() == [255, 0, 0, 0]
