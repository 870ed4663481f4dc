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
    failures = [f"{record['launch']}: {record['error']}" for record in records if record["error"]]
    assert not failures, "\n".join(failures)


def test_every_kernel_is_compiled() -> None:
    kernels = {name for source in sources() for name in kernel_names(source)}
    assert kernels <= {record["kernel"] for record in compiled("sm_90")}


def test_no_kernel_spills_registers_on_hopper() -> None:
    assert [record for record in compiled("sm_90") if record["stack"]] == []


def test_int8_products_use_hopper_matrix_units() -> None:
    products = [record for record in compiled("sm_90") if record["launch"] == "product"]
    assert [record["wgmma"] for record in products] == [True]


@pytest.mark.parametrize("gpu", ["sm_90", "gfx942"])
def test_int8_kernels_round_each_product_as_their_references_do(gpu: str) -> None:
    """A fused multiply-add rounds once where the reference rounds twice; the interpreter cannot show it."""
    names = {"_rowwise_kernel", "_quantize_tile_kernel", "_scaled_mm_kernel"}
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
