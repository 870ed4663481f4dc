"""The package's own names, and what all functions with bitsandbytes' names have in common."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lq_kernels
import pytest
import torch
from lq_kernels import functional as F
from lq_kernels.codebooks import four_bit_map
from lq_kernels.outliers import quantize_rowwise_outliers
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "migrating_from_bitsandbytes.md"


def test_the_product_of_the_package_is_the_function_of_the_module() -> None:
    assert lq_kernels.functional is F
    assert lq_kernels.matmul is F.matmul
    assert lq_kernels.matmul_4bit is F.matmul_4bit
    assert lq_kernels.MatmulLtState is F.MatmulLtState
    with pytest.raises(AttributeError, match="no attribute 'matmul_3bit'"):
        getattr(lq_kernels, "matmul_3bit")  # noqa: B009


PROGRAM = """
import sys
import lq_kernels
assert "torch" not in sys.modules and "triton" not in sys.modules
import importlib, pkgutil
for module in pkgutil.iter_modules(lq_kernels.__path__):
    importlib.import_module(f"lq_kernels.{module.name}")
from lq_kernels import functional, matmul, matmul_4bit
assert all(callable(getattr(lq_kernels, name)) for name in lq_kernels.__all__ if name != "functional")
assert set(lq_kernels.__all__) <= set(dir(lq_kernels))
assert all(hasattr(functional, name) for name in functional.__all__)
"""


@pytest.mark.integration
def test_importing_the_package_is_cheap_and_its_names_are_functions_whatever_is_imported() -> None:
    child = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_compiled_quantisation_gives_what_it_gives_in_eager(blocksize: int) -> None:
    def round_trip(x: Tensor) -> Tensor:
        packed, state = F.quantize_nf4(x * 2, blocksize=blocksize, compress_statistics=True)
        codes, state8 = F.quantize_blockwise(x, blocksize=blocksize)
        return F.dequantize_nf4(packed, state) + F.dequantize_blockwise(codes, state8)

    x = torch.randn(37, 130)
    assert torch.equal(torch.compile(round_trip, backend="aot_eager", fullgraph=True)(x), round_trip(x))


def test_get_4bit_type_gives_a_map_of_ones_own() -> None:
    for name in ("nf4", "fp4"):
        values = F.get_4bit_type(name, device="cpu")
        assert torch.equal(values, four_bit_map(name))
        values.zero_()
        assert four_bit_map(name).any()
    with pytest.raises(NotImplementedError, match="no op takes 'af4'"):
        F.get_4bit_type("af4", device="cpu")


def test_percentile_clipping_follows_the_history_of_squared_norms() -> None:
    history, squares = torch.zeros(100), []
    for step in range(1, 21):
        grad = torch.randn(4) * (1 + 9 * (step % 3 == 0))
        norm, limit, scale = F.percentile_clipping(grad, history, step, percentile=5)
        squares.append(float(grad.square().sum()))
        expected = torch.full((100,), squares[0])
        expected[1 : step + 1] = torch.tensor(squares)
        torch.testing.assert_close(history, expected)
        sixth = expected.sort().values[5].sqrt()
        torch.testing.assert_close(norm, torch.tensor(squares[-1]).sqrt())
        torch.testing.assert_close(limit, sixth)
        torch.testing.assert_close(scale, (sixth / norm).clamp(max=1))


@pytest.mark.parametrize("multiply", [lq_kernels.matmul_fp8_mixed, lq_kernels.matmul_fp8_global])
def test_simulated_fp8_products_are_as_accurate_as_published(multiply: Callable[..., Tensor]) -> None:
    a = (torch.randn(4, 32, 256) / 8).requires_grad_()
    b = (torch.randn(256, 64) / 16).requires_grad_()
    codes = F.create_fp8_map(True, 4, 3), F.create_fp8_map(True, 5, 2)
    out, exact = multiply(a, b, *codes), a @ b
    assert (out - exact).abs().mean() < 0.115
    grad = torch.randn_like(out) / 8
    grads, exact_grads = (torch.autograd.grad(y, (a, b), grad) for y in (out, exact))
    torch.testing.assert_close(grads[0], exact_grads[0], atol=0.015, rtol=0.1)
    for atol, bad in ((0.06, 0.1), (0.10, 0.02)):
        assert (~torch.isclose(grads[1], exact_grads[1], atol=atol, rtol=0.3)).float().mean() <= bad
    assert grads[1].any()


def test_simulated_fp8_blocks_are_rows_unless_a_size_is_given() -> None:
    a, b, codes = torch.randn(7, 96), torch.randn(96, 37), (F.create_fp8_map(True, 4, 3), F.create_fp8_map())
    a[3] *= 1000
    whole = lq_kernels.matmul_fp8_mixed(a, b, *codes)
    assert torch.equal(whole, lq_kernels.matmul_fp8_mixed(a, b, *codes, bsz=128, bsz2=64))
    for row in range(7):
        alone = lq_kernels.matmul_fp8_mixed(a[row : row + 1], b, *codes)
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-5, atol=1e-5 * float(a[row].abs().max()))
    assert not torch.equal(whole, lq_kernels.matmul_fp8_mixed(a, b, *codes, bsz=32))
    half = tuple(code.double() for code in codes)
    assert torch.equal(whole, lq_kernels.matmul_fp8_mixed(a, b, *half))
    for multiply in (lq_kernels.matmul_fp8_mixed, lq_kernels.matmul_fp8_global):
        out = torch.empty(7, 37)
        assert multiply(a, b, *codes, out=out) is out
        assert torch.equal(out, multiply(a, b, *codes))
        with pytest.raises(RuntimeError, match="out= has no gradients"):
            multiply(a.clone().requires_grad_(), b, *codes, out=out)


@pytest.mark.integration
@pytest.mark.parametrize("number", range(3))
def test_the_examples_of_the_migration_page_run(number: int, tmp_path: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "example.py").write_text(examples[number])
    done = subprocess.run([sys.executable, "-W", "error", "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_migration_page_names_every_function() -> None:
    named = set(re.findall(r"`([\w.]+)`", PAGE.read_text()))
    missing = {name for name in F.__all__ if not any(given.rpartition(".")[2] == name for given in named)}
    assert not missing


def every_function(device: torch.device) -> list[Tensor]:
    """Results that are the same on every device, to the bit."""
    x, weight = torch.randn(64, 256).to(device), torch.randn(96, 256).to(device)
    x[:, 7] *= 30
    codes, state = F.quantize_blockwise(x, blocksize=64)
    packed, state4 = F.quantize_nf4(weight, compress_statistics=True)
    CB, SCB, _ = F.int8_vectorwise_quant(weight)
    by_row, by_column, row_stats, col_stats, _ = F.int8_double_quant(x)
    total = F.int8_linear_matmul(by_row, CB)
    return [
        *(codes, state.absmax, F.dequantize_blockwise(codes, state)),
        *(packed, state4.absmax, F.dequantize_nf4(packed, state4)),
        *(by_row, by_column, row_stats, col_stats, total),
        *(F.int8_mm_dequant(total, row_stats, SCB), F.int8_scaled_mm(by_row, CB, row_stats, SCB)),
        *F.quantize_columnwise_and_transpose(x),
        *F.quantize_global(x),
        lq_kernels.matmul(x, weight),
    ]


def every_product(device: torch.device) -> Iterator[None]:
    """Products that wait for nothing, after the yield."""
    x, weight = torch.randn(64, 256, device=device, requires_grad=True), torch.randn(96, 256, device=device)
    packed, state = F.quantize_nf4(weight, compress_statistics=True)
    codes = F.create_fp8_map(True, 4, 3).to(device), F.create_fp8_map().to(device)
    columns = quantize_rowwise_outliers(x.detach(), 2.0)
    CB, SCB, _ = F.int8_vectorwise_quant(weight)
    yield
    out = [lq_kernels.matmul(x, weight.requires_grad_(), threshold=2.0), F.matmul_4bit(x, packed, state)]
    out += [multiply(x, weight.t(), *codes) for multiply in (F.matmul_fp8_mixed, F.matmul_fp8_global)]
    torch.autograd.backward(out, [torch.ones_like(value) for value in out])
    F.int8_mixed_scaled_mm(x.detach(), columns[0], CB, columns[1][:, 0] * 127, SCB, (columns[2], columns[3]))
    F.percentile_clipping(x.grad, torch.zeros(100, device=device), 1)
    F.quantize(x.detach())


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        results.append(every_function(torch.device(device)))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    for mode in ("default", "error"):  # the first time kernels are compiled and maps are copied
        try:
            for _ in every_product(torch.device("cuda")):
                torch.cuda.set_sync_debug_mode(mode)
        finally:
            torch.cuda.set_sync_debug_mode("default")
