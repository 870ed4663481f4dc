"""Puts an adapter from a folder, ours or PEFT's, on a model."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lq_plugin.adapter_checkpoint import check_base
from lq_plugin.adapter_files import SavedAdapter
from lq_plugin.layers.lora import LoRALayer
from lq_plugin.lora_placement import (
    adapter,
    attach,
    check_alike,
    lora_layers,
    modules_saved_whole,
    train_adapters,
    trains_as_before_on_error,
)
from lq_plugin.peft_names import split
from lq_plugin.structure import is_embedding, named_modules


def load_adapter(
    model: nn.Module, folder: str | Path, *, check_fingerprint: bool = True, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Puts the adapter in `folder`, ours or PEFT's, on a model, and returns the names of the layers.

    The layers are those that the file has tensors for. A model without adapters gets them, and trains what `add_lora`
    would; one with adapters on the same layers takes over their values. check_fingerprint=False loads an adapter
    beside another quantisation of its base. Nothing is changed when it raises: FileNotFoundError; ValueError for a file
    that is damaged or changed, another base, layers or shapes that do not fit, options that are not supported.
    """
    saved = SavedAdapter.read(Path(folder)).of_experts(model)
    if check_fingerprint and saved.base is not None:
        check_base(saved.base, model)
    present = lora_layers(model)
    if any(layer.merged for layer in present.values()):
        raise ValueError("the model's adapters are merged into its weights: unmerge_lora(model) first")
    modules = {name: module for name, module in reversed(list(named_modules(model)))}
    if present.keys() != saved.layers() and present:
        differing = ", ".join(sorted(present.keys() ^ saved.layers())[:5])
        raise ValueError(f"the model's adapters and those of {folder} are on different layers: {differing}")
    for name, layer in present.items():
        check_alike(name, layer, saved.config, "in the file")
    with trains_as_before_on_error(model):
        layers = present or {name: _new_layer(name, modules, saved, dtype) for name in sorted(saved.layers())}
        pending = _pending(model, layers, saved)
    if not present:
        attach(model, layers)
        train_adapters(model, saved.config)
    with torch.no_grad():
        for target, value in pending:
            target.copy_(value)
    return list(layers)


def _new_layer(name: str, modules: Mapping[str, nn.Module], saved: SavedAdapter, dtype: torch.dtype) -> LoRALayer:
    if name not in modules or not name:
        raise ValueError(f"the adapter has tensors for {name!r}, which this model does not have")
    module = modules[name]
    try:
        return adapter(module, saved.config, name, dtype)
    except TypeError as error:
        kind = "an embedding" if is_embedding(module) else f"a {type(module).__name__}"
        raise ValueError(f"the adapter has tensors for {name!r}, which is {kind} here: {error}") from error


def _pending(model: nn.Module, layers: Mapping[str, LoRALayer], saved: SavedAdapter) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of the model and the value that it takes; ValueError for what does not fit."""
    pairs: list[tuple[Tensor, Tensor]] = []
    beside = any(split(key)[1] is None for key in saved.tensors)
    own = {key.replace("_orig_mod.", ""): tensor for key, tensor in (model.state_dict() if beside else {}).items()}
    whole = modules_saved_whole(model, saved.config)
    for key, value in saved.tensors.items():
        layer, factor = split(key)
        if factor is not None and layer in layers:
            target = getattr(layers[layer], factor)
            if target is None:
                raise ValueError(f"the adapter has {key!r}, and its config says use_dora=False")
        else:
            target = _outside(key, own)
            trained_bias = saved.config.bias != "none" and key.rpartition(".")[2] == "bias"
            trains = trained_bias or any(key.startswith(f"{name}.") for name in whole)
            if target is None or (not trains and not _equal(target, value)):
                raise ValueError(f"the adapter holds {key!r}, which is no part of it that this model could take")
        if target.shape != value.shape:
            raise ValueError(f"{key!r} is {tuple(value.shape)} in the adapter and {tuple(target.shape)} in this model")
        pairs.append((target, value))
    _check_complete(layers, whole, saved)
    return pairs


def _outside(key: str, own: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor of the model that is meant by a key of a bias, of a module saved whole, or of the base."""
    plain = key.replace(".base_layer.", ".")
    layer, _, last = plain.rpartition(".")
    return next((own[k] for k in (key, plain, f"{layer}.base_layer.{last}") if k in own), None)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu().to(b.dtype), b)


def _check_complete(layers: Mapping[str, LoRALayer], whole: Iterable[str], saved: SavedAdapter) -> None:
    for name, layer in layers.items():
        if layer.lora_magnitude is not None and f"{name}.lora_magnitude_vector" not in saved.tensors:
            raise ValueError(f"the config says use_dora=True, and the adapter has no lengths for {name!r}")
    for name in whole:
        if not any(key.startswith(f"{name}.") for key in saved.tensors):
            raise ValueError(f"the config names {name!r} in modules_to_save, and the adapter has no tensors for it")
