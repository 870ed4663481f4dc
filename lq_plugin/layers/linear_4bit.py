"""Linear layers with a frozen 4-bit weight, under bitsandbytes' names and with its checkpoints.

Nothing is latched: each product runs in the dtype of its input, inside autocast in that of autocast, or in the
compute_dtype that was asked for.
"""

import torch
import torch.nn.functional as F
from lq_kernels.packed_4bit import Packed4bit, matmul_4bit
from torch import Tensor

from lq_plugin.formats.four_bit import FourBit, four_bit_format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.layers.frozen import FrozenLinear, output_dtype
from lq_plugin.layers.packed_rows import PackedRows


class Linear4bit(FrozenLinear):
    """nn.Linear with its weight in NF4 or FP4, frozen; gradients reach input and bias.

    compute_dtype: the product runs in it and its result is cast back; None computes in the dtype of the input.
    compress_statistics: scales in 8 bits. quant_storage: the dtype under which state_dict shows the bytes; in memory
    they are uint8. block_size: see FourBit. A new layer has the random weight of nn.Linear, quantised; on the meta
    device it has none until `requantize` or `load_state_dict(assign=True)`.

    state_dict is that of bitsandbytes' Linear4bit. Loading checks quant type, block size, double quantisation, shape,
    map and lengths against the layer. A float weight (O, I) is quantised.
    """

    format: FourBit
    rows: PackedRows

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
    ) -> None:
        self.format = four_bit_format(quant_type, block_size, compress_statistics, compute_dtype)
        self.rows = PackedRows((output_features, input_features), self.format, quant_storage)
        super().__init__(input_features, output_features, bias, device)

    @classmethod
    def with_format(cls, format: FrozenFormat, in_features: int, out_features: int) -> "Linear4bit":
        assert isinstance(format, FourBit)
        layer = Linear4bit(
            in_features,
            out_features,
            bias=False,
            compute_dtype=format.compute_dtype,
            compress_statistics=format.double_quantization,
            quant_type=format.quant_type,
            device="meta",
            block_size=format.block_size,
        )
        layer.format = format
        return layer

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.format.compute_dtype

    @property
    def packed(self) -> Packed4bit:
        """The operand of `matmul_4bit`; its rows are whole blocks."""
        return self.rows.packed(self.code_tensors(), self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        x = F.pad(input, (0, self.rows.padded - self.in_features)) if self.rows.padded > self.in_features else input
        compute = self.compute_dtype
        if compute is None:
            return matmul_4bit(x, self.packed, self.bias, self.format.few_bits)
        dtype = output_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            return matmul_4bit(x.to(compute), self.packed, self.bias).to(dtype)


class LinearNF4(Linear4bit):
    """Linear4bit in NF4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
            block_size,
        )


class LinearFP4(Linear4bit):
    """Linear4bit in FP4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
            block_size,
        )


FourBit.layer, FourBit.kept_as = Linear4bit, PackedRows
