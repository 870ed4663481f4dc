"""bitsandbytes on a CPU as an oracle: its signatures, its files, and its numbers where its CPU code is exact.

It is not exact where it quantises to 8 bits: since 0.50 by a uniform table, see test_traps.py.
"""

import inspect
from types import ModuleType
from typing import Any

import lq_kernels
import pytest
import torch
from hostile import heavy_tailed
from lq_kernels import functional as F
from torch import Tensor

bnb = pytest.importorskip("bitsandbytes")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

SAME = sorted(
    name
    for name in F.__all__
    if inspect.isfunction(getattr(bnb.functional, name, None)) and inspect.isfunction(getattr(F, name))
)


def both_modules(name: str) -> tuple[ModuleType, ModuleType]:
    return (bnb.functional, F) if hasattr(bnb.functional, name) else (bnb, lq_kernels)


@pytest.mark.parametrize("name", [*SAME, "matmul", "matmul_4bit"])
def test_arguments_have_the_names_order_and_defaults_of_bitsandbytes(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in both_modules(name))
    assert list(ours) == list(theirs)
    for argument, parameter in theirs.items():
        assert ours[argument].default == parameter.default, argument


def test_what_is_in_bitsandbytes_is_here_or_refused_in_the_documentation() -> None:
    public = [name for name, value in vars(bnb.functional).items() if inspect.isfunction(value) and name[0] != "_"]
    theirs = {name for name in public if getattr(bnb.functional, name).__module__ == bnb.functional.__name__}
    assert theirs - set(F.__all__) == {
        *("batched_igemm", "check_matmul", "elementwise_func", "fill", "get_paged", "get_ptr"),
        *("has_avx512bf16", "igemm", "is_on_gpu", "prefetch_tensor"),
    }


def test_quant_states_have_the_same_fields() -> None:
    theirs, ours = (inspect.signature(cls) for cls in (bnb.functional.QuantState, F.QuantState))
    assert list(ours.parameters) == list(theirs.parameters)
    assert sorted(F.QuantState.valid_qs_keys) == sorted(bnb.functional.QuantState.valid_qs_keys)
    assert F.QuantState.valid_qs_type_keys == bnb.functional.QuantState.valid_qs_type_keys
    ours_of_products = vars(lq_kernels.MatmulLtState())
    for name in ("CB", "SCB", "idx", "threshold", "has_fp16_weights", "is_training", "use_pool"):
        assert ours_of_products[name] == getattr(bnb.MatmulLtState(), name)


MAPS = [
    ("create_dynamic_map", {}),
    ("create_dynamic_map", {"signed": False}),
    *[("create_dynamic_map", {"max_exponent_bits": bits, "total_bits": bits}) for bits in range(2, 8)],
    ("create_fp8_map", {"exponent_bits": 4, "precision_bits": 3}),
    ("create_fp8_map", {}),
    ("create_linear_map", {}),
    ("create_linear_map", {"signed": False}),
    ("create_linear_map", {"add_zero": False}),
]


@pytest.mark.parametrize(("name", "arguments"), MAPS)
def test_maps_have_the_same_values(name: str, arguments: dict[str, Any]) -> None:
    theirs = getattr(bnb.functional, name)(**arguments).cpu()
    # They round each step of the formula to float32, we once.
    torch.testing.assert_close(getattr(F, name)(**arguments), theirs, rtol=1.5e-7, atol=1.2e-7)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_maps_are_equal(name: str) -> None:
    assert torch.equal(F.get_4bit_type(name, device="cpu"), bnb.functional.get_4bit_type(name, device="cpu"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_quantisation_is_equal(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    x = heavy_tailed(300, 700, dtype).flip(0)  # not a zero row at the end: theirs has absmax 1e-38 for a short block
    theirs, their_state = bnb.functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    ours, our_state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert torch.equal(our_state.absmax, their_state.absmax)
    assert our_state.shape == their_state.shape
    if quant_type == "nf4":
        assert torch.equal(ours, theirs)
    # fp4 has two codes for zero, and of a negative tie they take the larger magnitude: equal but for ties.
    values, others = F.dequantize_4bit(ours, our_state), bnb.functional.dequantize_4bit(theirs, their_state)
    tie = values != others
    middle = (values[tie].float() + others[tie].float()) / 2
    torch.testing.assert_close(middle, x[tie].float(), rtol=torch.finfo(dtype).eps, atol=0)
    assert tie.float().mean() < 1e-3
    assert (x[tie] < 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_each_reads_the_4_bit_weights_of_the_other(quant_type: str, compress: bool, dtype: torch.dtype) -> None:
    x = torch.randn(256, 300, dtype=dtype)
    packed, state = bnb.functional.quantize_4bit(x, compress_statistics=compress, quant_type=quant_type)
    theirs = bnb.functional.dequantize_4bit(packed, state)
    entries = state.as_dict(packed=True)
    ours = F.dequantize_4bit(packed, F.QuantState.from_dict(entries, CPU))
    assert_nearly_equal(ours, theirs, compress)

    packed, state = F.quantize_4bit(x, compress_statistics=compress, quant_type=quant_type)
    ours = F.dequantize_4bit(packed, state)
    read = bnb.functional.QuantState.from_dict(state.as_dict(packed=True), CPU)
    assert_nearly_equal(bnb.functional.dequantize_4bit(packed, read), ours, compress)


def assert_nearly_equal(value: Tensor, other: Tensor, compress: bool) -> None:
    """Equal; with compressed statistics absmax differs by the last bit of a map, the result by one rounding more."""
    if not compress:
        assert torch.equal(value, other)
    else:
        torch.testing.assert_close(value, other, rtol=torch.finfo(value.dtype).eps + 2**-21, atol=0)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_entries_of_a_file_are_the_same_to_the_byte(quant_type: str, compress: bool) -> None:
    x = torch.randn(256, 300, dtype=torch.bfloat16)
    theirs = bnb.functional.quantize_4bit(x, compress_statistics=compress, quant_type=quant_type)[1]
    entries = theirs.as_dict(packed=True)
    again = F.QuantState.from_dict(entries, CPU).as_dict(packed=True)
    assert set(again) == set(entries)
    for name, value in entries.items():
        assert torch.equal(again[name], value), name
    assert F.QuantState.from_dict(theirs.as_dict(), CPU) == F.QuantState.from_dict(entries, CPU)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 100, 4096])
def test_8_bit_codes_of_theirs_are_read_alike(blocksize: int, nested: bool, dtype: torch.dtype) -> None:
    x = heavy_tailed(30, 700, dtype)
    codes, theirs = bnb.functional.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    ours = F.QuantState.from_dict(theirs.as_dict(), CPU)
    expected = bnb.functional.dequantize_blockwise(codes, theirs)
    assert torch.equal(F.dequantize_blockwise(codes, ours), expected)
    if not nested:
        restored = F.dequantize_blockwise(codes, absmax=theirs.absmax, blocksize=blocksize, code=theirs.code)
        assert torch.equal(restored.to(dtype), expected)


def test_8_bit_codes_differ_from_theirs_where_their_table_is_too_coarse() -> None:
    x = torch.randn(1 << 16)
    (theirs, state), (ours, same) = (f.quantize_blockwise(x, blocksize=256) for f in (bnb.functional, F))
    assert torch.equal(state.absmax, same.absmax)
    # 0.15 % were measured, by 3 codes at most; their grid has 65 536 points in [-1, 1].
    apart = (theirs.int() - ours.int()).abs()
    assert (apart > 0).float().mean() < 0.003
    assert apart.max() <= 4
    restored = F.dequantize_blockwise(ours, same), bnb.functional.dequantize_blockwise(theirs, state)
    assert ((restored[0] - restored[1]).abs() <= 2 * (restored[1] - x).abs() + 3.1e-5 * state.absmax.max()).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_4_bit_products_agree(rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = torch.randn(128, 256), torch.randn(rows, 256).to(dtype), torch.randn(128).to(dtype)
    packed, state = bnb.functional.quantize_4bit(weight.to(dtype), quant_type="nf4")
    ours = F.matmul_4bit(x, packed.t(), F.QuantState.from_dict(state.as_dict(packed=True), CPU), bias=bias)
    exact = x.double() @ bnb.functional.dequantize_4bit(packed, state).double().t() + bias.double()
    # sums of 256 products of about 1 in float32, rounded to dtype; theirs may round twice
    bound = torch.finfo(dtype).eps * exact.abs() + 256 * 2**-24 * 16
    theirs = bnb.matmul_4bit(x, packed.t(), state, bias=bias)
    for value in (ours, theirs):
        assert ((value.double() - exact).abs() <= 2 * bound).all()
    assert ours.dtype == theirs.dtype


def test_int8_functions_agree() -> None:
    A, B = heavy_tailed(64, 256).half(), torch.randn(96, 256).half()
    bias = torch.randn(96).half()
    for threshold in (0.0, 3.0):
        theirs, ours = (f.int8_vectorwise_quant(A[:-1], threshold) for f in (bnb.functional, F))
        assert torch.equal(ours[1], theirs[1])
        apart = (ours[0].int() - theirs[0].int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() <= 1 / 500
        assert threshold == 0 or torch.equal(ours[2], theirs[2])
    (CA, SCA, _), (CB, SCB, _) = F.int8_vectorwise_quant(A), F.int8_vectorwise_quant(B)
    total = F.int8_linear_matmul(CA, CB)
    assert torch.equal(total, bnb.functional.int8_linear_matmul(CA, CB))
    torch.testing.assert_close(
        F.int8_vectorwise_dequant(CA, SCA), bnb.functional.int8_vectorwise_dequant(CA, SCA), rtol=2**-22, atol=0
    )
    theirs, ours = (f.int8_mm_dequant(total, SCA, SCB, bias=bias) for f in (bnb.functional, F))
    # Their factor is 1.8e-5 too large, and their bias is added to a float16.
    torch.testing.assert_close(ours, theirs, rtol=2**-10 + 2e-5, atol=2**-9)


OPTIMIZERS = {"adam": 2, "ademamix": 2, "lion": 1, "momentum": 1, "rmsprop": 1, "adagrad": 1}


@pytest.mark.parametrize("numel", [1000, 8193])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_32_bit_optimizer_updates_agree(name: str, numel: int) -> None:
    p = torch.randn(numel) * 0.1
    state1 = torch.zeros((2, numel) if name == "ademamix" else numel)
    state2 = torch.zeros(numel) if OPTIMIZERS[name] == 2 else None
    start = [p, state1, state2]
    runs = [[None if value is None else value.clone() for value in start] for _ in range(2)]
    for step in range(1, 11):
        g = torch.randn(numel) * 0.1
        for functional, (param, first, second) in zip((bnb.functional, F), runs, strict=True):
            functional.optimizer_update_32bit(
                name, g, param, first, 0.9, 1e-6, step, 1e-3, second, 0.99, 0.999, 3.0, 0.1, 0.5
            )
    for theirs, ours in zip(*runs, strict=True):
        # 10 steps of lr 1e-3, each off by a few roundings of 2^-24 of the step and one of the parameter
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert (runs[1][0] != p).all()
