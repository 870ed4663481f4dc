"""What transformers has to be told of a model whose layers were frozen after it was built. It is not imported here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lq_plugin.layers.experts import FrozenExperts
from lq_plugin.layers.frozen import FrozenWeight


class OwnNames(list[Any]):
    """No conversions of names when a model is saved. before: those that it had, or None for those of its class."""

    before: Any = None


def is_transformers_model(module: nn.Module) -> bool:
    return _has_base(module, "PreTrainedModel")


def tell_transformers(model: nn.Module) -> None:
    """Marks the configs of a model with frozen layers, and has save_pretrained keep the names of frozen experts.

    Flash attention casts float32 queries to the dtype of the first linear's weight, and to the config's where that is
    marked. save_pretrained splits fused experts by expert, which their codes cannot be.
    """
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if _has_base(config, "PreTrainedConfig") and _holds(module, FrozenWeight):
            config._is_quantized = True
        if is_transformers_model(module) and _holds(module, FrozenExperts):
            _keep_own_names(module)


@contextmanager
def names_of_files(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' conversions of names are those of the model before its experts were frozen."""
    own = model.__dict__.get("_weight_conversions")
    if not isinstance(own, OwnNames):
        yield
        return
    _set_conversions(model, own.before)
    try:
        yield
    finally:
        _set_conversions(model, own)


def _keep_own_names(model: nn.Module) -> None:
    present = model.__dict__.get("_weight_conversions")
    if not isinstance(present, OwnNames):
        own = OwnNames()
        own.before = present
        _set_conversions(model, own)


def _set_conversions(model: nn.Module, conversions: Any) -> None:
    if conversions is None:
        model.__dict__.pop("_weight_conversions", None)
    else:
        model.__dict__["_weight_conversions"] = conversions


def _holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _has_base(value: object, name: str) -> bool:
    return any(base.__name__ == name for base in type(value).__mro__)
