"""LoRA on a whole model: which layers get an adapter, what trains, merging, and the learning rates of LoRA+.

Names are those of the model without adapters, as PEFT writes them.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lq_plugin.adapter_files import save_adapter
from lq_plugin.adapter_loading import load_adapter
from lq_plugin.layers.lora import LoRAEmbedding, LoRALayer
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.lora_placement import (
    adapter,
    attach,
    check_patterns,
    check_saved_whole,
    children,
    lora_layers,
    targets,
    train_adapters,
    trains_as_before_on_error,
    with_heads,
)
from lq_plugin.structure import named_modules

__all__ = [
    "add_lora",
    "load_adapter",
    "lora_layers",
    "lora_plus_groups",
    "merge_lora",
    "remove_lora",
    "save_adapter",
    "unmerge_lora",
    "without_lora",
]

_LORA_PLUS_RATIO = 16.0  # https://arxiv.org/abs/2402.12354, section 5


def add_lora(model: nn.Module, config: object, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Puts adapters beside layers of a model, in place, freezes all else, and returns the names of the layers.

    config: LoRAConfig, peft.LoraConfig or a dict of their fields. dtype: of the adapters. What trains afterwards: the
    adapters, the biases that config.bias names, and config.modules_to_save, in place: ties stay. task_type adds the
    head of the task to modules_to_save, as PEFT does. A model that has adapters of the same config is left as it is.

    Nothing is changed when it raises. ValueError: a pattern that matches nothing, a layer that cannot have an adapter,
    adapters of another config, modules_to_save that are quantised or tied to something that stays frozen.
    """
    config = with_heads(LoRAConfig.of(config), model)
    present = lora_layers(model)
    if present:
        if any(layer.config != config for layer in present.values()):
            raise ValueError("the model has adapters of another config: call remove_lora(model) first")
        return list(present)
    found = targets(model, config)
    check_patterns(model, config, list(found))
    check_saved_whole(model, config)
    with trains_as_before_on_error(model):
        layers = {name: adapter(module, config, name, dtype) for name, module in found.items()}
    attach(model, layers)
    train_adapters(model, config)
    return list(layers)


def merge_lora(model: nn.Module, *, reversible: bool = True) -> list[str]:
    """Puts the adapters into the weights and returns the names of the layers; the adapters stay, for `unmerge_lora`.

    A quantised weight is quantised anew, so the merged model is the adapted one up to the rounding of the format.
    reversible: keeps the earlier weights in host memory, codes and scales as they are. While it is merged, a model
    neither trains nor gives a state_dict. Nothing is changed when it raises: ValueError for a sum that is not finite, a
    weight that another module shares, a model without adapters or with merged ones.
    """
    layers = _adapted(model)
    _check_mergeable(model, layers)
    for layer in layers.values():
        layer.merge(reversible)
    return list(layers)


def unmerge_lora(model: nn.Module) -> list[str]:
    """Gives the layers the weights that they had before `merge_lora`, to the bit, and returns their names."""
    layers = _adapted(model)
    for name, layer in layers.items():
        if not layer.merged or layer._kept is None:
            raise ValueError(f"the adapter of {name!r} is not merged, or was merged with reversible=False")
    for layer in layers.values():
        layer.unmerge()
    return list(layers)


def remove_lora(model: nn.Module, merge: bool = True) -> list[str]:
    """Takes the adapters off and returns the names of the layers; merge: their change stays in the weights.

    Biases and modules_to_save keep what they learned. Parameters stay frozen as they are. With merge=False the weights
    are to the bit what they were before `add_lora`. Nothing is changed when it raises.
    """
    layers = _adapted(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged}
    if merge:
        _check_mergeable(model, {name: layer for name, layer in layers.items() if name not in merged})
    elif any(layer._kept is None for layer in merged.values()):
        raise ValueError("the adapters were merged with reversible=False: the earlier weights are gone")
    for layer in layers.values():
        if merge and not layer.merged:
            layer.merge(reversible=False)
        elif not merge and layer.merged:
            layer.unmerge()
    for parent, child_name, child in children(model):
        if isinstance(child, LoRALayer):
            parent._modules[child_name] = child.base_layer
    return list(layers)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The base alone, as the reference model of DPO and its kin; ValueError while adapters are merged."""
    layers = _adapted(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapters are merged into the weights: unmerge_lora(model) first")
    before = {layer: layer.enabled for layer in layers.values()}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = _LORA_PLUS_RATIO,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: B learns `ratio` times as fast as A and all else that trains.

    embedding_lr: of adapters of embeddings, by default lr. weight_decay: of matrices; vectors have none.

    Source: LoRA+, https://arxiv.org/abs/2402.12354
    """
    rates = {}
    for layer in _adapted(model).values():
        embedding = isinstance(layer, LoRAEmbedding)
        rates[id(layer.lora_A)] = ("lora_embedding", embedding_lr or lr) if embedding else ("lora_A", lr)
        rates[id(layer.lora_B)] = ("lora_embedding", embedding_lr or lr) if embedding else ("lora_B", lr * ratio)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name, rate = rates.get(id(parameter), ("others", lr))
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            name += "_no_decay" if decay != weight_decay else ""
            group = {"params": [], "lr": rate, "weight_decay": decay, "name": name}
            groups.setdefault((name, decay), group)["params"].append(parameter)
    return list(groups.values())


def _adapted(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers: call add_lora(model, config) first")
    return layers


def _check_mergeable(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in named_modules(model):
        for parameter in module.parameters(recurse=False):
            users[id(parameter)].append(name)
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"the adapter of {name!r} is merged already")
        if len(users[id(layer.weight)]) > 1:
            others = ", ".join(user for user in users[id(layer.weight)] if user != name)
            raise ValueError(f"{name!r} shares its weight with {others}, which merging would change too: untie them")
        try:
            layer.mergeable_weight()
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
