"""Layers to use by hand in any nn.Module, without Lightning."""

from lq_plugin.layers.causal_lm import causal_lm_loss
from lq_plugin.layers.chunked_cross_entropy import linear_cross_entropy
from lq_plugin.layers.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    FrozenEmbedding,
    StableEmbedding,
)
from lq_plugin.layers.experts import FrozenExperts
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.linear import QuantLinear
from lq_plugin.layers.linear_4bit import Linear4bit, LinearFP4, LinearNF4
from lq_plugin.layers.linear_8bit import Linear8bitLt
from lq_plugin.layers.linear_fp8 import LinearFP8Global, LinearFP8Mixed
from lq_plugin.layers.lora import LoRAEmbedding, LoRALinear
from lq_plugin.layers.lora_experts import LoRAExperts
from lq_plugin.layers.switchback import (
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
)

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "FrozenEmbedding",
    "FrozenExperts",
    "FrozenLinear",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearFP8Global",
    "LinearFP8Mixed",
    "LinearNF4",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "QuantLinear",
    "StableEmbedding",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "causal_lm_loss",
    "linear_cross_entropy",
]
