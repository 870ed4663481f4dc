"""The quantization_config of a config.json that describes layers of bitsandbytes, read and written.

Source: transformers' BitsAndBytesConfig, https://huggingface.co/docs/transformers/main_classes/quantization
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lq_kernels.quant_state import QuantState
from torch import Tensor

from lq_plugin.formats.four_bit import FourBit, four_bit_format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.llm_int8 import LLMInt8

# A layer's entries beside its bias
_FOUR_BIT = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
_EIGHT_BIT = ("weight", "SCB", "weight_format")

Wanted = Callable[[str], FrozenFormat | None]


@dataclass(frozen=True)
class Prequantized:
    """A checkpoint whose layers are quantised already.

    bits: 4 or 8. threshold: of all int8 layers. wanted: name of a layer -> the format that the user asked for: of
    element type and compute dtype it has the say, of block size and double quantisation the file.
    """

    bits: int
    threshold: float
    wanted: Wanted

    @classmethod
    def of(cls, config: Mapping[str, Any], wanted: Wanted) -> "Prequantized":
        """config: the quantization_config of a config.json. ValueError: of another method than bitsandbytes."""
        method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
        if method != "bitsandbytes":
            raise ValueError(
                f"the checkpoint is quantised with {method!r}; only bitsandbytes' checkpoints and plain ones are read: "
                "take the original weights, or load it dequantised in transformers and call lq_plugin.convert"
            )
        bits = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None
        if bits is None:
            raise ValueError("the quantization_config of the checkpoint has neither load_in_4bit nor load_in_8bit set")
        return cls(bits, float(config.get("llm_int8_threshold", 6.0)), wanted)

    @property
    def names(self) -> tuple[str, ...]:
        return _FOUR_BIT if self.bits == 4 else _EIGHT_BIT

    def format_of(self, name: str, entries: Mapping[str, Tensor]) -> FrozenFormat:
        """The format of the layer `name`, told by its entries; ValueError where it is not the one that is wanted."""
        found = self._four_bit(name, entries) if self.bits == 4 else LLMInt8(self.threshold)
        wanted = self.wanted(name)
        if wanted is None:
            raise ValueError(
                f"layer {name!r} is in {found.name} in the checkpoint and cannot be left in 16 bits: take it out of "
                "skip=, or load the original weights"
            )
        if isinstance(found, LLMInt8) and isinstance(wanted, LLMInt8):
            return found
        if isinstance(found, FourBit) and isinstance(wanted, FourBit) and found.quant_type == wanted.quant_type:
            return replace(found, compute=wanted.compute)
        raise ValueError(
            f"layer {name!r} is in {found.name} in the checkpoint, and {wanted.name} was asked for: pass "
            f"linear={found.name!r}, or load the original weights"
        )

    def _four_bit(self, name: str, entries: Mapping[str, Tensor]) -> FourBit:
        statistics = {key: value for key, value in entries.items() if key != "weight"}
        try:
            state = QuantState.from_dict(statistics, "cpu")
        except ValueError as error:
            raise ValueError(f"layer {name!r} of the checkpoint: {error}") from error
        assert state.quant_type is not None
        return four_bit_format(state.quant_type, state.form()[0], state.nested)


def quantization_config(formats: Collection[FrozenFormat], skipped: Collection[str], dtype: str) -> dict[str, Any]:
    """What config.json says of a model whose quantised layers have `formats`; `skipped`: the names of the others.

    dtype: of the products of 4-bit layers that ask for none. ValueError: 4-bit and 8-bit layers, or thresholds, that
    one config cannot describe together.
    """
    four_bit = [format for format in formats if isinstance(format, FourBit)]
    eight_bit = [format for format in formats if isinstance(format, LLMInt8)]
    if four_bit and eight_bit:
        raise ValueError(
            "the model has 4-bit and 8-bit layers, and one config.json describes one of them: convert all layers to "
            "one width, or use export_merged"
        )
    thresholds = sorted({format.threshold for format in eight_bit})
    if len(thresholds) > 1:
        raise ValueError(f"the int8 layers have thresholds {thresholds}, and one config.json has one: use one of them")
    kinds = sorted({format.quant_type for format in four_bit})
    computes = {str(format.compute_dtype).removeprefix("torch.") for format in four_bit if format.compute_dtype}
    if len(computes) > 1:
        raise ValueError(
            f"the 4-bit layers compute in {sorted(computes)}, and one config.json has one: use one of them"
        )
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": bool(four_bit),
        "_load_in_8bit": bool(eight_bit),
        "load_in_4bit": bool(four_bit),
        "load_in_8bit": bool(eight_bit),
        "bnb_4bit_quant_type": kinds[0] if kinds else "fp4",
        "bnb_4bit_use_double_quant": any(format.double_quantization for format in four_bit),
        "bnb_4bit_compute_dtype": computes.pop() if computes else dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": thresholds[0] if thresholds else 6.0,
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
