"""Optimizers with few-bit state; each with a parent in torch.optim computes what that computes.

X keeps float32 state, X8bit 8-bit state, and either takes state="8bit", "fp8" or "32bit". PagedX keeps it in the CPU's
memory.
"""

from lq_plugin.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from lq_plugin.optim.adam import Adam, Adam8bit, Adam32bit
from lq_plugin.optim.adamw import AdamW, AdamW8bit, AdamW32bit
from lq_plugin.optim.ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit
from lq_plugin.optim.bitsandbytes_state import from_bitsandbytes, to_bitsandbytes
from lq_plugin.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from lq_plugin.optim.lars import LARS, LARS8bit, LARS32bit
from lq_plugin.optim.lion import Lion, Lion8bit, Lion32bit
from lq_plugin.optim.muon import Muon, Muon8bit, Muon32bit, split_parameters
from lq_plugin.optim.options import Options, state_bytes
from lq_plugin.optim.paged import (
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
    PagedLion,
    PagedLion8bit,
    PagedLion32bit,
)
from lq_plugin.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
from lq_plugin.optim.sgd import SGD, SGD8bit, SGD32bit
from lq_plugin.optim.swap import TWINS, Swap, become, twin_of
from lq_plugin.optim.torch_state import to_torch

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "TWINS",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Muon",
    "Muon8bit",
    "Muon32bit",
    "Options",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "Swap",
    "become",
    "from_bitsandbytes",
    "split_parameters",
    "state_bytes",
    "to_bitsandbytes",
    "to_torch",
    "twin_of",
]
