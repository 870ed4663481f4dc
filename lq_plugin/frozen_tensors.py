"""A layer whose weights are on the meta device or just read, and its frozen counterpart."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.layers.experts import FrozenExperts, projections
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.linear_8bit import Linear8bitLt


def frozen_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a linear or of experts that freezing quantises: it needs all of them."""
    return projections(module) or ("weight",)


def frozen_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Frozen linears and experts by name."""
    return {name: module for name, module in model.named_modules() if is_frozen_layer(module)}


def is_frozen_layer(module: nn.Module) -> bool:
    if isinstance(module, Linear8bitLt):
        return module.is_frozen
    return isinstance(module, FrozenLinear | FrozenExperts)


def take_place(module: nn.Module, frozen: nn.Module) -> None:
    """Makes `module` what `frozen` is: whoever holds it, the model itself too, sees it under the names that it had.

    Its hooks and further attributes are kept, its weight is freed.
    """
    had = {name: value for name, value in vars(module).items() if name not in ("converted_from", "formats")}
    hooks = {name: value for name, value in had.items() if "hooks" in name}
    attributes = had | vars(frozen) | hooks | {"training": module.training}
    module.__class__ = type(frozen)
    module.__dict__.clear()
    module.__dict__.update(attributes)


def restored(
    name: str, module: nn.Module, format: FrozenFormat, entries: Mapping[str, Tensor], device: torch.device
) -> nn.Module:
    """The frozen counterpart of `module`, whose weights are on the meta device, from the entries of its state_dict.

    Parameters that `entries` leave out, as a bias, are those of `module`. ValueError: entries of the weight that are
    missing, cut short or of another format or size; `name` is for that message.
    """
    layer = format.freeze(module)
    others = {key: x for key, x in module.named_parameters(recurse=False) if key not in frozen_weights(module)}
    read = {key: x.to(device) for key, x in entries.items()}
    try:
        layer.load_state_dict({**others, **read}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"layer {name!r} cannot be read as {format.name}: {error}") from error
    return layer
