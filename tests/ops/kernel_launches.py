"""Launches of every kernel at sizes of real models, compiled for a GPU that need not be there.

`python kernel_launches.py sm_90` prints one JSON object for each kernel that the launches of LAUNCHES would start on
that GPU. Tensors are on the meta device, and Triton's driver is replaced by one that answers the questions of a
launcher and compiles instead of launching. Adding a kernel is one line of LAUNCHES.
"""

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from lq_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lq_kernels.codebooks import dynamic_map
from lq_kernels.multi_tensor import Batch
from lq_kernels.optimizer_8bit import Adam, launch_adam
from lq_kernels.optimizer_state import new_state
from lq_kernels.percentile_clipping import new_history
from lq_kernels.rowwise import (
    quantize_columnwise_transposed,
    quantize_rowwise,
    quantize_tensorwise,
    quantize_tensorwise_transposed,
)
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Gpu:
    target: GPUTarget
    shared_memory: int
    multiprocessors: int


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 166_912, 108),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 232_448, 132),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 232_448, 148),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 65_536, 304),
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


LAUNCHES: dict[str, Callable[[], object]] = {
    "rows of 4096": lambda: _launch(quantize_rowwise, meta(32768, 4096)),
    "rows of 1024": lambda: _launch(quantize_rowwise, meta(32768, 1024, dtype=torch.float32)),
    "rows of 28672": lambda: _launch(quantize_rowwise, meta(8192, 28672)),
    "rows too long for registers": lambda: _launch(quantize_rowwise, meta(4096, 128256)),
    "rows, transposed": lambda: _launch(quantize_rowwise, meta(4096, 4096).t()),
    "columns": lambda: _launch(quantize_columnwise_transposed, meta(4096, 14336)),
    "product": lambda: _product(32768, 4096, 16384),
    "product, few tiles": lambda: _product(1024, 1024, 1024),
    "product, very few tiles": lambda: _product(16, 4096, 4096),
    "product of odd size": lambda: _product(8192, 4100, 14336),
    "product, rows of b contiguous": lambda: _product(8192, 4096, 4096, transposed=False),
    "columns of odd size": lambda: _launch(quantize_columnwise_transposed, meta(83, 331, dtype=torch.float16)),
    "matrix": lambda: _launch(quantize_tensorwise, meta(4096, 14336)),
    "matrix, transposed": lambda: _launch(quantize_tensorwise_transposed, meta(4096, 14336)),
    "blocks of 256": lambda: _launch(quantize_blockwise, meta(4096, 14336), dynamic_map("dynamic").to("meta"), 256),
    "blocks of 256, back": lambda: _launch(
        dequantize_blockwise,
        meta(4096, 4096, dtype=torch.uint8),
        meta(65536, dtype=torch.float32),
        dynamic_map("dynamic").to("meta"),
        256,
        torch.bfloat16,
    ),
    "AdamW, 8-bit state, clipped": lambda: _launch_adam([(4096, 4096), (83, 331)], decoupled=True, percentile=5),
    "Adam, float32 state": lambda: _launch_adam([(4096,), (331,)], decoupled=False, percentile=None),
}


def _launch(op: Any, *args: Any) -> None:
    op.launcher(*args)


def _launch_adam(shapes: list[tuple[int, ...]], decoupled: bool, percentile: int | None) -> None:
    params = [meta(*shape) for shape in shapes]
    states = [new_state(param, param.ndim > 1) | new_history(param.device) for param in params]
    adam = Adam(1e-3, (0.9, 0.999), 1e-8, 0.01, decoupled, percentile=percentile)
    launch_adam(Batch(params, states, torch.bfloat16), params, adam)


def _product(M: int, K: int, N: int, transposed: bool = True) -> None:
    a = meta(M, K, dtype=torch.int8)
    b = meta(N, K, dtype=torch.int8).t() if transposed else meta(K, N, dtype=torch.int8)
    scale_a, scale_b = meta(M, 1, dtype=torch.float32), meta(1, N, dtype=torch.float32)
    _launch(scaled_mm, a, b, scale_a, scale_b, meta(N), torch.bfloat16)


class CompileOnlyDriver:
    """Answers for a GPU as Triton's driver would."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.utils = SimpleNamespace(get_device_properties=self.properties)

    def properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.gpu.shared_memory, "multiprocessor_count": self.gpu.multiprocessors}

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(gpu: Gpu) -> list[dict[str, Any]]:
    """One record for each kernel, or for each launch that failed, with its error."""
    triton.runtime.driver.set_active(CompileOnlyDriver(gpu))
    records: list[dict[str, Any]] = []
    launch = ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        records.append({"launch": launch, "kernel": self.__name__, "error": None, **facts(kernel, gpu)})
        return kernel

    JITFunction.run = compile_only
    for launch, start in LAUNCHES.items():
        try:
            start()
        except Exception:  # of whatever kind: the test names this kernel, and the others are compiled all the same
            records.append({"launch": launch, "kernel": "", "error": traceback.format_exc()})
    return records


def facts(kernel: Any, gpu: Gpu) -> dict[str, Any]:
    """Shared memory, and whether products and sums may fuse.

    On NVIDIA also registers, bytes of stack (spilled registers) and instructions of the machine code.
    """
    shared = kernel.metadata.shared
    if shared > gpu.shared_memory:
        raise RuntimeError(f"{kernel.metadata.name} needs {shared} bytes of shared memory, of {gpu.shared_memory}")
    if gpu.target.backend != "cuda":
        return {"shared": shared, "fused": kernel.metadata.enable_fp_fusion}
    usage, sass = disassemble(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.MULTILINE)
    return {
        "shared": shared,
        "fused": kernel.metadata.enable_fp_fusion,
        "registers": registers,
        "stack": stack,
        "instructions": len(opcodes),
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
    }


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tool that Triton's wheel ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, sass


if __name__ == "__main__":
    for record in compile_all(GPUS[sys.argv[1]]):
        print(json.dumps(record))
