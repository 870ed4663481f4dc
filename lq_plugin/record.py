"""What a checkpoint says about the low bits of the run that wrote it, and whether a run may go on from it.

Weights of trainable formats are plain, so a checkpoint of another format would load without a word; the record, kept
under a key of its own, makes that an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lq_plugin import rng
from lq_plugin.conversion import Conversion
from lq_plugin.optim.base import LowBitOptimizer

KEY = "lq_plugin"
VERSION = 1

_OTHER_ARGUMENTS = "give QuantPlugin the linear= and skip= of the checkpoint's run"
_OTHER_CHOICE = (
    "linear='auto' chooses by device and table, and one of them is another; give QuantPlugin "
    f"linear=torch.load(path, weights_only=True)[{KEY!r}]['linear'], the formats of the checkpoint's run, and partial=True"
)


def write(checkpoint: dict[str, Any], conversion: Conversion, precision: str) -> None:
    """Adds the formats by layer, the precision and the random generators, as plain values and tensors.

    The generators of several processes differ, and a checkpoint is that of the first: they are left out then.
    """
    checkpoint[KEY] = {
        "version": VERSION,
        "linear": _formats(conversion),
        "precision": precision,
        "rng": None if _is_distributed() else rng.capture(),
    }


def check(checkpoint: Mapping[str, Any], conversion: Conversion) -> Mapping[str, Any] | None:
    """The record, or None where the run had no plugin; ValueError if this model is not in the same formats."""
    record = checkpoint.get(KEY)
    if record is None:
        rank_zero_info("The checkpoint was written without QuantPlugin: its weights go on in the formats of this run.")
        return None
    if record["version"] != VERSION:
        raise ValueError(
            f"the checkpoint's record of lq_plugin has version {record['version']}, this version of lq_plugin reads "
            f"version {VERSION}: install the lq_plugin that wrote it, or load its state_dict alone"
        )
    saved, present = record["linear"], _formats(conversion)
    is_auto = any(layer.is_auto for layer in conversion.layers)
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            raise ValueError(
                f"layer {name!r} was trained in {saved.get(name, 'no format')} and is now in "
                f"{present.get(name, 'no format')}: {_OTHER_CHOICE if is_auto else _OTHER_ARGUMENTS}, or load its "
                "state_dict alone to go on in another format"
            )
    return record


def check_optimizers(checkpoint: Mapping[str, Any], optimizers: Sequence[LowBitOptimizer]) -> None:
    """ValueError where a saved optimizer of ours kept its state, or clipped, in another way than this run does."""
    for saved, optimizer in zip(checkpoint.get("optimizer_states", []), optimizers, strict=False):
        for before, now in zip(saved["param_groups"], optimizer.param_groups, strict=False):
            for option in ("state", "percentile_clipping"):
                if option in before and before[option] != now[option]:
                    raise ValueError(
                        f"the checkpoint's {type(optimizer).__name__} has {option}={before[option]!r}, this run has "
                        f"{now[option]!r}: give QuantPlugin the optimizer= and percentile_clipping= of that run, or "
                        "load its state_dict alone"
                    )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _formats(conversion: Conversion) -> dict[str, str]:
    return {layer.name: layer.formats.name for layer in conversion.converted if layer.formats}
