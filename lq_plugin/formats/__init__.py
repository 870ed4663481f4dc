"""Every format by name. A format is one file; adding one adds a line here."""

from lq_plugin.formats.four_bit import FP4, NF4
from lq_plugin.formats.fp8 import Fp8Rowwise as Fp8Rowwise
from lq_plugin.formats.fp8 import Fp8Tensorwise as Fp8Tensorwise
from lq_plugin.formats.fp8 import fp8_rowwise, fp8_rowwise_with_gw_hp, fp8_tensorwise
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.gemm import GemmFormats
from lq_plugin.formats.int8 import Int8Rowwise as Int8Rowwise
from lq_plugin.formats.int8 import (
    int8_rowwise,
    int8_switchback,
    int8_switchback_mem_efficient,
    int8_switchback_vectorwise,
)
from lq_plugin.formats.llm_int8 import LLMInt8
from lq_plugin.formats.simulated_fp8 import sim_fp8_global, sim_fp8_mixed

Format = GemmFormats | FrozenFormat

TRAINABLE_FORMATS: dict[str, GemmFormats] = {
    "int8_switchback": int8_switchback,
    "int8_switchback_vectorwise": int8_switchback_vectorwise,
    "int8_switchback_mem_efficient": int8_switchback_mem_efficient,
    "int8_rowwise": int8_rowwise,
    "fp8_tensorwise": fp8_tensorwise,
    "fp8_rowwise": fp8_rowwise,
    "fp8_rowwise_with_gw_hp": fp8_rowwise_with_gw_hp,
    "sim_fp8_mixed": sim_fp8_mixed,
    "sim_fp8_global": sim_fp8_global,
}
FROZEN_FORMATS: dict[str, FrozenFormat] = {
    "nf4": NF4(),
    "nf4_dq": NF4(double_quantization=True),
    "fp4": FP4(),
    "fp4_dq": FP4(double_quantization=True),
    "llm_int8": LLMInt8(),
}
FORMATS: dict[str, Format] = {**TRAINABLE_FORMATS, **FROZEN_FORMATS}

# How other projects spell a format -> its name here.
SPELLINGS = {
    "int8": "int8_switchback",
    "switchback": "int8_switchback",
    "int8-training": "int8_rowwise",  # Lightning's bitsandbytes plugin
    "int8_mixed_precision": "int8_rowwise",  # torchao
    "fp8": "fp8_tensorwise",
    "float8": "fp8_tensorwise",
    "tensorwise": "fp8_tensorwise",  # torchao recipes
    "rowwise": "fp8_rowwise",
    "rowwise_with_gw_hp": "fp8_rowwise_with_gw_hp",
    "fp8_rowwise_hp": "fp8_rowwise_with_gw_hp",
    "nf4-dq": "nf4_dq",  # Lightning's bitsandbytes plugin
    "fp4-dq": "fp4_dq",
    "llm.int8": "llm_int8",
}


def format_named(name: str) -> Format:
    """The format of that name; an unknown name is a ValueError that lists the known ones."""
    if name in FORMATS:
        return FORMATS[name]
    known = ", ".join(FORMATS)
    if name.replace("-", "_") == "int8_switchback_vectorwise_mem_efficient":
        raise ValueError(
            f"format {name!r}: column scales of the weight do not serve both its products, so the vectorwise variant "
            "cannot be memory-efficient; take int8_switchback_vectorwise or int8_switchback_mem_efficient"
        )
    if name in SPELLINGS:
        meant = SPELLINGS[name]
        advice = f"use {meant!r}" if meant in FORMATS else f"that is {meant!r} here, which this version does not have"
        raise ValueError(f"unknown format {name!r}: {advice}; formats: {known}")
    raise ValueError(f"unknown format {name!r}; formats: {known}")
