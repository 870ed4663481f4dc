"""The functions of `bitsandbytes.functional` under their names: to migrate, change the import.

Argument names, their order and defaults are those of bitsandbytes 0.50.2, for what it has removed those of 0.49.2.
docs/migrating_from_bitsandbytes.md lists what differs, and why.
"""

from lq_kernels.codebooks import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from lq_kernels.functional_4bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    get_4bit_type,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from lq_kernels.functional_8bit import (
    dequantize,
    dequantize_blockwise,
    dequantize_no_absmax,
    quantize,
    quantize_blockwise,
    quantize_no_absmax,
)
from lq_kernels.functional_clipping import percentile_clipping
from lq_kernels.functional_fp8 import matmul_fp8_global, matmul_fp8_mixed
from lq_kernels.functional_int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from lq_kernels.functional_matmul_4bit import gemv_4bit, matmul_4bit
from lq_kernels.functional_optim import optimizer_update_8bit_blockwise, optimizer_update_32bit
from lq_kernels.functional_switchback import (
    dequantize_rowwise,
    int8_matmul_mixed_dequantize,
    int8_matmul_rowwise_dequantize,
    quantize_columnwise_and_transpose,
    quantize_global,
    quantize_global_transpose,
    quantize_rowwise,
)
from lq_kernels.matmul_int8 import MatmulLtState, matmul
from lq_kernels.quant_state import QuantState

__all__ = [
    "MatmulLtState",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "dequantize_no_absmax",
    "dequantize_rowwise",
    "gemv_4bit",
    "get_4bit_type",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_matmul_mixed_dequantize",
    "int8_matmul_rowwise_dequantize",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "matmul",
    "matmul_4bit",
    "matmul_fp8_global",
    "matmul_fp8_mixed",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "percentile_clipping",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_columnwise_and_transpose",
    "quantize_fp4",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_nf4",
    "quantize_no_absmax",
    "quantize_rowwise",
]
