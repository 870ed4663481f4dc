"""The linear layer of LLM.int8(), frozen in int8 or trained in floats, under bitsandbytes' name.

    output      = input by row times weight by row in int8, outlier columns of the input in floats
    grad_input  = grad_output @ dequantised weight, in the dtype of grad_output
    grad_weight = grad_output by column times input by column in int8, with the scales of those columns; with a
                  threshold in floats

Nothing is latched: a weight that trains is quantised on every forward, in train() and eval() alike, and whether its
gradient needs the codes of columns is decided by autograd.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339
"""

from typing import Any

import torch
from lq_kernels.matmul_int8 import MatmulLtState, matmul
from torch import Tensor, nn

from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.llm_int8 import LLMInt8
from lq_plugin.layers.frozen import FrozenLinear, output_dtype
from lq_plugin.layers.int8_rows import Int8Rows


class Linear8bitLt(FrozenLinear):
    """nn.Linear multiplied in int8.

    has_fp16_weights=False: the weight is frozen in int8, with the maximum of each row in float32, and state_dict is
    that of bitsandbytes' layer: weight, SCB, weight_format. True: the weight is an ordinary parameter that trains, and
    so is the state_dict. threshold: an input of at least this magnitude is an outlier, and its column is multiplied in
    floats; 0 knows none. `index` is accepted for bitsandbytes' sake and not read.

    A frozen layer takes a float weight (O, I) from a state_dict too, and quantises it. Files in the layouts col32,
    col_turing and col_ampere of older bitsandbytes are refused by name.
    """

    format: LLMInt8
    rows: Int8Rows

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: object | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.format = LLMInt8(threshold)
        self.rows = Int8Rows((output_features, input_features), self.format)
        self.has_fp16_weights = has_fp16_weights
        if has_fp16_weights:
            nn.Linear.__init__(self, input_features, output_features, bias, device, dtype)
        else:
            super().__init__(input_features, output_features, bias, device, dtype)

    @classmethod
    def with_format(cls, format: FrozenFormat, in_features: int, out_features: int) -> "Linear8bitLt":
        assert isinstance(format, LLMInt8)
        return Linear8bitLt(in_features, out_features, False, False, format.threshold, device="meta")

    @property
    def is_frozen(self) -> bool:
        return not self.has_fp16_weights

    @property
    def weight_dtype(self) -> torch.dtype:
        return super().weight_dtype if self.is_frozen else self.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        self.check_input(input)
        state = MatmulLtState(threshold=self.format.threshold, has_fp16_weights=self.has_fp16_weights)
        if self.is_frozen:
            state.CB, state.SCB = self.weight, self.rows.amax(self.code_tensors())
        x = input.to(output_dtype(input))
        with torch.autocast(x.device.type, enabled=False):
            return matmul(x, self.weight, state=state, bias=self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return super().dequantize(dtype) if self.is_frozen else self.weight.detach().to(dtype or self.weight.dtype)

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        if self.is_frozen:
            super().requantize(weight)
        else:
            self.weight.copy_(weight)

    def reset_parameters(self) -> None:
        if self.is_frozen:
            super().reset_parameters()
        else:
            nn.Linear.reset_parameters(self)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        if self.is_frozen:
            super()._save_to_state_dict(*arguments)
        else:
            nn.Linear._save_to_state_dict(self, *arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        if self.is_frozen:
            super()._load_from_state_dict(*arguments)
        else:
            nn.Linear._load_from_state_dict(self, *arguments)


LLMInt8.layer, LLMInt8.kept_as = Linear8bitLt, Int8Rows
