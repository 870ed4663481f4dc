"""What has to be the same in every process of a run, as texts that can be compared and shown."""

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lq_plugin import __version__
from lq_plugin.conversion import Conversion
from lq_plugin.formats import Format
from lq_plugin.formats.frozen import FrozenFormat


def versions() -> dict[str, str]:
    return {
        "lq_plugin's version": __version__,
        "torch's version": torch.__version__,
        "triton's version": _version("triton"),
        "lightning's version": _version("lightning"),
    }


def formats(conversion: Conversion) -> dict[str, str]:
    """Of each converted layer; and which have adapters."""
    of_layers = {f"layer {layer.name!r}": _told(layer.formats) for layer in conversion.converted}
    return of_layers | {"layers with adapters": ", ".join(map(str, conversion.adapted)) or "none"}


def optimizers(of_run: Iterable[Optimizer]) -> dict[str, str]:
    """Class and options of each and, where they have them, of each param group. Reads learning rates on the device."""
    facts: dict[str, str] = {}
    for number, optimizer in enumerate(of_run):
        facts[f"optimizer {number}"] = type(optimizer).__name__
        for position, group in enumerate(optimizer.param_groups):
            place = f"optimizer {number}, param group {position}: "
            facts |= {place + option: _value(value) for option, value in group.items() if option not in _PARAMETERS}
            facts[place + "number of parameters"] = str(len(group["params"]))
    return facts


def settings(of_run: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in of_run.items()}


_PARAMETERS = ("params", "param_names")


def _value(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)


def _told(format: Format | None) -> str:
    """A frozen format is few values; one that trains is known by its name."""
    return repr(format) if isinstance(format, FrozenFormat) else format.name if format else "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
