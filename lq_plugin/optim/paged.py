"""The optimizers that bitsandbytes calls paged: those of their name, with state in the CPU's memory (offload.py)."""

from lq_plugin.optim.adam import Adam, Adam8bit, Adam32bit
from lq_plugin.optim.adamw import AdamW, AdamW8bit, AdamW32bit
from lq_plugin.optim.ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit
from lq_plugin.optim.lion import Lion, Lion8bit, Lion32bit


class PagedAdam(Adam):
    """Adam with offload=True unless it is given."""

    default_offload = True


class PagedAdam8bit(Adam8bit):
    """Adam8bit with offload=True unless it is given."""

    default_offload = True


class PagedAdam32bit(Adam32bit):
    """Adam32bit with offload=True unless it is given."""

    default_offload = True


class PagedAdamW(AdamW):
    """AdamW with offload=True unless it is given."""

    default_offload = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit with offload=True unless it is given."""

    default_offload = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW32bit with offload=True unless it is given."""

    default_offload = True


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with offload=True unless it is given."""

    default_offload = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix8bit with offload=True unless it is given."""

    default_offload = True


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix32bit with offload=True unless it is given."""

    default_offload = True


class PagedLion(Lion):
    """Lion with offload=True unless it is given."""

    default_offload = True


class PagedLion8bit(Lion8bit):
    """Lion8bit with offload=True unless it is given."""

    default_offload = True


class PagedLion32bit(Lion32bit):
    """Lion32bit with offload=True unless it is given."""

    default_offload = True
