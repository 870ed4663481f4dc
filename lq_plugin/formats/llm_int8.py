"""LLM.int8(): the weight in int8 with a scale for each row; features with outliers are multiplied in 16 bits.

Source: Dettmers et al. 2022, section 3, https://arxiv.org/abs/2208.07339
"""

from dataclasses import dataclass
from typing import ClassVar

from lq_plugin.formats.frozen import FrozenFormat


@dataclass(frozen=True)
class LLMInt8(FrozenFormat):
    """threshold: a feature of the input with a magnitude of at least this is an outlier; 0 knows none."""

    threshold: float = 6.0

    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"LLMInt8 got threshold={self.threshold!r}, expected 0 (no outliers) or more")

    @property
    def name(self) -> str:
        return "llm_int8"
