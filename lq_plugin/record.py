"""What a checkpoint says about the low bits of the run that wrote it, and whether a run may go on from it.

Weights of trainable formats are plain, so a checkpoint of another format would load without a word; the record, kept
under a key of its own, makes that an error.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lq_plugin import ranks, rng
from lq_plugin.conversion import Conversion
from lq_plugin.optim.base import LowBitOptimizer

KEY = "lq_plugin"
VERSION = 1

# Ranks come to a checkpoint together, unless one of them failed and saves what it has.
_PATIENCE = timedelta(seconds=60)

_OTHER_ARGUMENTS = "give QuantPlugin the linear= and skip= of the checkpoint's run"
_OTHER_CHOICE = (
    "linear='auto' chooses by device and table, and one of them is another; give QuantPlugin the formats of the "
    f"checkpoint's run, linear=torch.load(path, weights_only=True)[{KEY!r}]['linear'] and partial=True"
)


def write(checkpoint: dict[str, Any], conversion: Conversion, precision: str) -> None:
    """Adds the formats by layer, the precision and the random generators, as plain values and tensors.

    Every rank calls it. Of several, the generators of each go into the checkpoint that rank 0 writes, in order; a rank
    that is alone warns after a minute, and its checkpoint has none.
    """
    checkpoint[KEY] = {
        "version": VERSION,
        "linear": _formats(conversion),
        "precision": precision,
        "rng": None if ranks.is_distributed() else rng.capture(),
    }
    if ranks.is_distributed():
        checkpoint[KEY]["rng_of_ranks"] = _generators_of_ranks(checkpoint["global_step"])


def generators(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """This rank's random generators; None, and a line that says so, where it is another number of processes."""
    of_ranks = record.get("rng_of_ranks") or ([record["rng"]] if record["rng"] else [])
    if len(of_ranks) == ranks.world_size():
        return of_ranks[ranks.rank()]
    rank_zero_info(
        f"The checkpoint has the random generators of {len(of_ranks)} processes and this run has {ranks.world_size()}: "
        "they start from this run's seed, so dropout and shuffling differ from those of an undisturbed run."
    )
    return None


def restore_generators(states: dict[str, Any]) -> None:
    rng.restore(states, own_device_only=ranks.is_distributed())


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


def _generators_of_ranks(step: int) -> list[dict[str, Any]]:
    """By rank, on rank 0; elsewhere nothing."""
    states = io.BytesIO()
    torch.save(rng.capture(own_device_only=True), states)
    gathered, absent = ranks.gathered_on_first(f"rng/{step}", states.getvalue(), _PATIENCE)
    if absent:
        warnings.warn(
            f"ranks {absent} do not take part in saving this checkpoint, which is left without the random generators: "
            "a run that goes on from it draws other numbers. Call save_checkpoint on every rank",
            stacklevel=2,
        )
    return [torch.load(io.BytesIO(value), weights_only=True) for value in gathered]


def _formats(conversion: Conversion) -> dict[str, str]:
    return {layer.name: layer.formats.name for layer in conversion.converted if layer.formats}
