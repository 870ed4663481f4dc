"""How an optimizer keeps its state, what it does beyond torch's arguments, and how many bytes that takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lq_kernels.blockwise import BLOCK_SIZE
from lq_kernels.optimizer_state import code_name
from lq_kernels.percentile_clipping import SCOPES
from torch import Tensor

# What `state` may be, and the format of the kernels that it stands for.
FORMATS = {"8bit": "dynamic", "fp8": "e4m3", "32bit": "float32"}
STATES = tuple(FORMATS)
UPDATE_CLIPS = (None, "rms")
MASTER_WEIGHTS = (None, "8bit", "32bit")
FORMAT_VERSION = 1

# Kept in every param_group, and so in every checkpoint: what is needed to read the state back.
FORMAT = {"format_version": FORMAT_VERSION, "block_size": BLOCK_SIZE}

_REFUSED = {
    "amsgrad": "its running maximum is not kept; leave it out",
    "differentiable": "the kernels have no backward; use the torch optimizer",
    "foreach": "one launch updates all tensors already; leave it out",
    "fused": "one launch updates all tensors already; leave it out",
}
DROPPED = ("foreach", "fused")  # how torch runs its step: no part of what it computes
_RUNNING = ("offload", "gradient_release")  # how ours runs: no part of param_groups, nor of checkpoints


def code_names(signs: Sequence[bool]) -> dict[str, str]:
    """The entries of a param_group that name the map of each moment's 8-bit codes."""
    return {f"code{i}": code_name(signed) for i, signed in enumerate(signs, 1)}


@dataclass(frozen=True)
class Options:
    """What an optimizer of ours takes beyond the arguments of torch's; in a plugin, what it sets on each.

    state: "8bit" (dynamic map), "fp8" (e4m3) or "32bit". Tensors with fewer than two dimensions or fewer than
        `min_8bit_size` elements keep float32 state, and embeddings keep `embedding_state`.
    percentile_clipping: clips the gradient at that percentile (1 .. 99) of its last 100 norms, each tensor by its own
        norms or, with clip_scope="global", all by the norm over all of them; None and 100 are off.
    update_clip: "rms" divides the learning rate of a tensor by the RMS of its update where that is above 1
        (StableAdamW; Adam and AdamW).
    stochastic_rounding: of bfloat16 weights, by bits that depend on `rounding_seed`, step, tensor and element only.
    master_weights: the bits of 16-bit weights that they do not hold, in "8bit" (a byte beside bfloat16) or "32bit".
    offload: keeps states of large tensors in pinned memory of the CPU and streams them past the device (offload.py).
    gradient_release: updates each parameter in the backward pass, as soon as its gradient is complete, and frees the
        gradient; one backward pass for each step, and no clipping by a norm over all tensors (gradient_release.py).
    block_size is written into checkpoints; 256 is the one that exists.
    """

    state: str = "8bit"
    percentile_clipping: int | None = None
    min_8bit_size: int = 4096
    block_size: int = BLOCK_SIZE
    embedding_state: str = "32bit"
    clip_scope: str = "tensor"
    update_clip: str | None = None
    stochastic_rounding: bool = False
    rounding_seed: int = 0
    master_weights: str | None = None
    offload: bool = False
    gradient_release: bool = False

    def __post_init__(self) -> None:
        check_options(self.as_group())
        if self.gradient_release:
            check_released(self.as_group())

    def as_group(self) -> dict[str, Any]:
        """The entries of a param_group."""
        entries = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _RUNNING}
        return FORMAT | entries | {"percentile_clipping": checked_percentile(self.percentile_clipping)}


def check_options(group: Mapping[str, Any]) -> None:
    """Raises ValueError for entries of a param_group that are no options."""
    for name, known in (
        ("state", STATES),
        ("embedding_state", STATES),
        ("clip_scope", SCOPES),
        ("update_clip", UPDATE_CLIPS),
        ("master_weights", MASTER_WEIGHTS),
    ):
        if group[name] not in known:
            raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {group[name]!r}")
    checked_percentile(group["percentile_clipping"])
    if group["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size counts elements and cannot be negative, got {group['min_8bit_size']}")
    if group["block_size"] != BLOCK_SIZE:
        raise ValueError(f"8-bit state exists in blocks of {BLOCK_SIZE}, got block_size={group['block_size']}")
    if group["stochastic_rounding"] and group["master_weights"] is not None:
        raise ValueError("master_weights keep what stochastic_rounding would round away: choose one of them")


def check_released(group: Mapping[str, Any]) -> None:
    """Raises ValueError where a param group asks for what cannot go with gradient_release."""
    if group["clip_scope"] == "global":
        raise ValueError(
            "gradient_release updates each tensor before the others' gradients exist, and clip_scope='global' needs "
            "the norm over all of them: take clip_scope='tensor', or leave out gradient_release"
        )


def refuse(optimizer: str, arguments: Mapping[str, Any], accepted: tuple[str, ...] = ()) -> None:
    """Raises for arguments of the torch parent that are set and that we do not compute."""
    for name, reason in _REFUSED.items():
        if name not in accepted and arguments.get(name):
            raise ValueError(f"{optimizer} got {name}={arguments[name]!r}, expected False: {reason}")
    if any(isinstance(beta, Tensor) for beta in arguments.get("betas", ())):
        raise ValueError(f"{optimizer} got betas={arguments['betas']!r}, expected floats: pass their values")


def checked_percentile(percentile: object) -> int | None:
    """`percentile`, or None where it means off."""
    if percentile is None or percentile == 100:
        return None
    if not isinstance(percentile, int) or isinstance(percentile, bool) or not 1 <= percentile <= 99:
        raise ValueError(f"percentile_clipping is an int from 1 to 99, or None for no clipping, got {percentile!r}")
    return percentile


def state_format(param: Tensor, group: Mapping[str, Any], embedding: bool) -> str:
    """The format in which state created now for `param` is kept; its size is that of the whole tensor."""
    state = group["embedding_state"] if embedding and group["state"] != "32bit" else group["state"]
    small = param.ndim < 2 or param.numel() < max(group["min_8bit_size"], 1)
    return "float32" if small else FORMATS[state]


def state_bytes(
    parameter: Tensor, options: Options, embedding: bool, moments: int = 2, torch_moments: int | None = None
) -> tuple[int, int]:
    """Bytes of so many moments: torch's, in the type of the parameter, and ours. The step is left out."""
    before = (moments if torch_moments is None else torch_moments) * parameter.numel() * parameter.element_size()
    return before, moments * moment_bytes(parameter, state_format(parameter, options.as_group(), embedding))


def moment_bytes(parameter: Tensor, kind: str) -> int:
    """Bytes of one moment of `parameter` in a format."""
    if kind == "float32":
        return 4 * parameter.numel()
    rows = parameter.shape[0]
    return parameter.numel() + 4 * rows * math.ceil(parameter.numel() // rows / BLOCK_SIZE)
