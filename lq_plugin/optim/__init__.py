"""Optimizers with few-bit state; each computes what its parent in torch.optim computes."""

from lq_plugin.optim.adam import Adam8bit
from lq_plugin.optim.adamw import AdamW8bit
from lq_plugin.optim.options import Options, state_bytes
from lq_plugin.optim.swap import TWINS, Swap, become, twin_of

__all__ = ["TWINS", "Adam8bit", "AdamW8bit", "Options", "Swap", "become", "state_bytes", "twin_of"]
