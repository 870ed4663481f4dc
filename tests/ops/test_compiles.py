"""Every kernel compiles for every GPU that we name, without one: see kernel_launches.py."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import lq_kernels
import pytest

pytest.importorskip("triton")

GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")

# What launches say in their names -> what our error says where the GPU lacks it. Nothing else may fail.
LACKING = {"sm_80": {"needs fp8": "sm_80 has no fp8"}, "gfx942": {"needs fp8": "fnuz"}}

pytestmark = pytest.mark.integration


@cache
def compiled(gpu: str) -> list[dict[str, Any]]:
    """What kernel_launches.py prints, in a process where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("kernel_launches.py")
    child = subprocess.run([sys.executable, script, gpu], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_compiles(gpu: str) -> None:
    records = compiled(gpu)
    assert len(records) > 10
    failures = [
        f"{record['launch']}: {record['error']}"
        for record in records
        if record["error"] and not any(word in record["launch"] for word in LACKING.get(gpu, ()))
    ]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("gpu", LACKING)
def test_what_a_gpu_lacks_is_an_error_that_names_it(gpu: str) -> None:
    for word, message in LACKING[gpu].items():
        errors = [str(record["error"]) for record in compiled(gpu) if word in record["launch"]]
        assert len(errors) > 10
        assert [error for error in errors if "RuntimeError" not in error or message not in error] == []


def test_every_kernel_is_compiled() -> None:
    kernels = {name for source in sources() for name in kernel_names(source)}
    assert kernels <= {record["kernel"] for record in compiled("sm_90")}


def test_no_kernel_spills_registers_on_hopper() -> None:
    assert [record for record in compiled("sm_90") if record["stack"]] == []


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_codes_of_fp8_are_read_where_they_are_set(gpu: str) -> None:
    """ptxas moves some behind the place where they are read: unset_registers.py."""
    unset = {f"{record['launch']}: {record['kernel']}": record.get("unset") for record in compiled(gpu)}
    assert {name: registers for name, registers in unset.items() if registers} == {}


def test_products_use_hopper_matrix_units_and_its_copy_engine() -> None:
    kernels = {"_scaled_mm_kernel", "_scaled_mm_tma_kernel"}
    products = [record for record in compiled("sm_90") if record["kernel"] in kernels]
    assert [
        record["launch"] for record in products if not record["wgmma"] and "few tiles" not in record["launch"]
    ] == []
    copied = {record["launch"] for record in products if record["kernel"] == "_scaled_mm_tma_kernel"}
    assert {"product", "product of a short K", "product, few tiles", "sums"} < copied
    assert {f"{name}, needs fp8" for name in ("product of e4m3", "product of e5m2", "precise product")} < copied
    assert [name for name in copied if "odd" in name or "unaligned" in name or "rows of b" in name] == []


@pytest.mark.parametrize("gpu", ["sm_90", "gfx942"])
def test_8_bit_kernels_round_each_product_as_their_references_do(gpu: str) -> None:
    """A fused multiply-add rounds once where the reference rounds twice; the interpreter cannot show it."""
    names = {
        "_rowwise_kernel",
        "_rowwise_column_amax_kernel",
        "_quantize_tile_kernel",
        "_scaled_mm_kernel",
        "_quantize_kernel",
        "_quantize_long_kernel",
    }
    names |= {f"_{way}_{what}_kernel" for way in ("quantize", "dequantize") for what in ("4bit", "scales")}
    names |= {"_scaled_mm_tma_kernel"} if gpu == "sm_90" else set()
    fused = {record["kernel"]: record["fused"] for record in compiled(gpu) if record["kernel"] in names}
    assert fused == dict.fromkeys(names, False)


def sources() -> list[str]:
    return [path.read_text() for path in Path(lq_kernels.__path__[0]).glob("*.py")]


def kernel_names(source: str) -> list[str]:
    """Kernels are the @triton.jit functions whose names end in _kernel."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    ]
