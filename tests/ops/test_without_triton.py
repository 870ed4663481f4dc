"""Where Triton does not exist (macOS, Windows) everything imports and the references run."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, pkgutil, sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch
import lq_kernels
for module in pkgutil.iter_modules(lq_kernels.__path__):
    importlib.import_module(f"lq_kernels.{module.name}")

from lq_kernels._op import OPS
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.scaled_mm import scaled_mm

x = torch.tensor([[127.0, 1.0, -2.0]])
codes, scale = quantize_rowwise(x)
assert codes.tolist() == [[127, 1, -2]] and scale.item() == 1
out = scaled_mm(codes, codes.t(), scale, scale, None, torch.float32)
assert out.item() == 127 * 127 + 1 + 4
assert "triton" not in sys.modules
for op in OPS.values():
    try:
        op._launch(x)  # where the dispatcher sends a CUDA tensor
    except RuntimeError as error:
        assert op.name in str(error) and "pip install 'triton" in str(error), error
    else:
        raise AssertionError(f"{op} ran without Triton")
print(len(OPS), "ops")
"""


@pytest.mark.integration
def test_without_triton_references_run_and_gpu_tensors_are_an_error() -> None:
    child = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout.split()[0]) >= 5
