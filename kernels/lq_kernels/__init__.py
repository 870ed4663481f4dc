"""Low-bit operations for PyTorch: a PyTorch reference with a Triton launcher for each; see kernels/README.md.

At the top are the differentiable products, under bitsandbytes' names; the ops are in the modules, and `functional` has
them under bitsandbytes' names. Names are imported when they are first used, so that `import lq_kernels` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lq_kernels import functional
    from lq_kernels.functional_fp8 import matmul_fp8_global, matmul_fp8_mixed
    from lq_kernels.functional_matmul_4bit import matmul_4bit
    from lq_kernels.matmul_int8 import MatmulLtState, matmul

_HOMES = {
    "MatmulLtState": "lq_kernels.matmul_int8",
    "matmul": "lq_kernels.matmul_int8",
    "matmul_4bit": "lq_kernels.functional_matmul_4bit",
    "matmul_fp8_global": "lq_kernels.functional_fp8",
    "matmul_fp8_mixed": "lq_kernels.functional_fp8",
}

__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "matmul_fp8_global", "matmul_fp8_mixed"]


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module("lq_kernels.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
