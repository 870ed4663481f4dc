"""How an optimizer keeps its state, and how many bytes that takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lq_kernels.blockwise import BLOCK_SIZE
from lq_kernels.optimizer_state import CODE_NAMES
from torch import Tensor

STATES = ("8bit", "32bit")
FORMAT_VERSION = 1

# Kept in every param_group, and so in every checkpoint: what is needed to read the state back.
FORMAT = {
    "format_version": FORMAT_VERSION,
    "block_size": BLOCK_SIZE,
    **{f"code{i}": name for i, name in CODE_NAMES.items()},
}


_REFUSED = {
    "amsgrad": "its running maximum is not kept; leave it out",
    "differentiable": "the kernels have no backward; use the torch optimizer",
    "foreach": "one launch updates all tensors already; leave it out",
    "fused": "one launch updates all tensors already; leave it out",
}
DROPPED = ("foreach", "fused")  # how torch runs its step: no part of what it computes


@dataclass(frozen=True)
class Options:
    """What the plugin sets on an optimizer beyond the arguments of torch's.

    Tensors with fewer than two dimensions or fewer than `min_8bit_size` elements keep float32 state, and embeddings
    keep `embedding_state`. `percentile_clipping` clips each tensor's gradient at that percentile (1 .. 99) of its last
    100 norms; None and 100 are off. `block_size` is written into checkpoints; 256 is the one that exists.
    """

    state: str = "8bit"
    percentile_clipping: int | None = None
    min_8bit_size: int = 4096
    block_size: int = BLOCK_SIZE
    embedding_state: str = "32bit"

    def __post_init__(self) -> None:
        check_state("state", self.state)
        check_state("embedding_state", self.embedding_state)
        checked_percentile(self.percentile_clipping)
        if self.min_8bit_size < 0:
            raise ValueError(f"min_8bit_size counts elements and cannot be negative, got {self.min_8bit_size}")
        if self.block_size != BLOCK_SIZE:
            raise ValueError(f"8-bit state exists in blocks of {BLOCK_SIZE}, got block_size={self.block_size}")

    def as_group(self) -> dict[str, Any]:
        """The entries of a param_group."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return entries | {"percentile_clipping": checked_percentile(self.percentile_clipping)} | FORMAT


def refuse(optimizer: str, arguments: Mapping[str, Any], accepted: tuple[str, ...] = ()) -> None:
    """Raises for arguments of the torch parent that are set and that we do not compute."""
    for name, reason in _REFUSED.items():
        if name not in accepted and arguments.get(name):
            raise ValueError(f"{optimizer} got {name}={arguments[name]!r}, expected False: {reason}")
    if any(isinstance(beta, Tensor) for beta in arguments.get("betas", ())):
        raise ValueError(f"{optimizer} got betas={arguments['betas']!r}, expected floats: pass their values")


def check_state(what: str, state: object) -> None:
    if state not in STATES:
        raise ValueError(f"{what} is one of {', '.join(map(repr, STATES))}, got {state!r}")


def checked_percentile(percentile: object) -> int | None:
    """`percentile`, or None where it means off."""
    if percentile is None or percentile == 100:
        return None
    if not isinstance(percentile, int) or isinstance(percentile, bool) or not 1 <= percentile <= 99:
        raise ValueError(f"percentile_clipping is an int from 1 to 99, or None for no clipping, got {percentile!r}")
    return percentile


def keeps_8bit_state(param: Tensor, options: Options, embedding: bool) -> bool:
    """Whether the moments of `param` are kept in 8 bits; its size is that of the whole tensor, not of a shard."""
    state = options.embedding_state if embedding and options.state == "8bit" else options.state
    return state == "8bit" and param.ndim >= 2 and param.numel() >= max(options.min_8bit_size, 1)


def state_bytes(parameter: Tensor, options: Options, embedding: bool) -> tuple[int, int]:
    """Bytes of the two moments of Adam: torch's, in the type of the parameter, and ours. The step is left out."""
    before = 2 * parameter.numel() * parameter.element_size()
    if not keeps_8bit_state(parameter, options, embedding):
        return before, 2 * 4 * parameter.numel()
    rows = parameter.shape[0]
    scales = rows * math.ceil(parameter.numel() // rows / BLOCK_SIZE)
    return before, 2 * (parameter.numel() + 4 * scales)
