"""Compiles what a launcher launches for a GPU that need not be there.

Tensors are on the meta device, and Triton's driver is replaced by one that answers the questions of a launcher and
compiles instead of launching.
"""

import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from unset_registers import unset_registers

LaunchTable = dict[str, Callable[[], object]]


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


def launch(op: Any, *args: Any) -> None:
    """Launches an op as the dispatcher would for CUDA tensors."""
    op.launcher(*args)


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


def compile_all(launches: LaunchTable, gpu: Gpu) -> list[dict[str, Any]]:
    """One record for each kernel, or for each launch that failed, with its error."""
    triton.runtime.driver.set_active(CompileOnlyDriver(gpu))
    records: list[dict[str, Any]] = []
    name = ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        records.append({"launch": name, "kernel": self.__name__, "error": None, **facts(kernel, gpu)})
        return kernel

    JITFunction.run = compile_only
    for name, start in launches.items():
        try:
            start()
        except Exception:  # of whatever kind: the test names this kernel, and the others are compiled all the same
            records.append({"launch": name, "kernel": "", "error": traceback.format_exc()})
    return records


def facts(kernel: Any, gpu: Gpu) -> dict[str, Any]:
    """Shared memory, and whether products and sums may fuse.

    On NVIDIA also registers, bytes of stack (spilled registers) and instructions of the machine code, and, where it
    converts to fp8, the registers that it reads unset.
    """
    shared = kernel.metadata.shared
    if shared > gpu.shared_memory:
        raise RuntimeError(f"{kernel.metadata.name} needs {shared} bytes of shared memory, of {gpu.shared_memory}")
    if gpu.target.backend != "cuda":
        return {"shared": shared, "fused": kernel.metadata.enable_fp_fusion}
    usage, sass = disassemble(kernel.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.MULTILINE)
    return {
        "shared": shared,
        "fused": kernel.metadata.enable_fp_fusion,
        "registers": registers,
        "stack": stack,
        "instructions": len(opcodes),
        "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],
        "unset": unset_registers(sass) if re.search(r"cvt\.rn\.satfinite\.e\dm\dx2\.f32", kernel.asm["ptx"]) else [],
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
