"""Models on their way out: quantised ones that transformers and bitsandbytes load, merged ones that need neither.

A folder appears whole or not at all, and the model stays as it is. Layers are read back one decoder layer at a time,
so that a model that fits quantised need not fit in 16 bits.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.bitsandbytes_config import quantization_config
from lq_plugin.frozen_tensors import is_frozen_layer
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.linear_4bit import Linear4bit
from lq_plugin.layers.lora import LoRALayer
from lq_plugin.model_folder import copy_tokenizer
from lq_plugin.new_folder import new_folder
from lq_plugin.plain_tensors import PlainTensor, plain_tensors
from lq_plugin.safetensors_shards import ShardWriter
from lq_plugin.structure import is_linear, named_modules
from lq_plugin.transformers_models import is_transformers_model, names_of_files

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def save_quantized(model: nn.Module, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Writes a transformers model with frozen layers so that `from_pretrained(folder)` loads it with bitsandbytes.

    Linear layers in the entries of spec 15.1 and 15.2; everything else in its dtype, fused experts too, which
    bitsandbytes cannot hold in 4 bits. config.json describes the format; the tokenizer's files are copied where the
    model's source is on this machine.

    ValueError: no frozen layer; LoRA beside the layers; 4-bit and 8-bit layers together; rows that are no whole blocks,
    with the block sizes that fit. TypeError: not a transformers model. FileExistsError: something is in `folder`.
    """
    model = _compiled_from(model)
    if not is_transformers_model(model):
        raise TypeError(f"save_quantized takes a transformers model, got {type(model).__name__}: save its state_dict")
    layers = _frozen_linears(model)
    _check_savable(model, layers)
    config: Any = copy.deepcopy(model.config)
    skipped = [name for name, module in named_modules(model) if is_linear(module) and name not in layers]
    dtype = str(model_dtype(model)).removeprefix("torch.")
    config.quantization_config = quantization_config({x.format for x in layers.values()}, skipped, dtype)
    _write(model, config, folder, _quantized(model, layers), max_shard_size)


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model as if it had never been quantised: LoRA merged, weights in `dtype`, in shards with an index.

    A transformers model gets its config.json and generation config, weights in the names and shapes of its files, and
    the tokenizer's files where its source is on this machine: `from_pretrained(folder)` loads it without lq_plugin.
    Any other nn.Module gets model.safetensors with the keys of its state_dict, one key for tied weights: load_weights
    and safetensors.torch.load_model read it. Weights that transformers keeps in
    float32 and buffers stay as they are. Biases, norms and embeddings that trained are written as trained.

    ValueError: a dtype that is not bfloat16, float16 or float32; a merged weight that is not finite.
    TypeError: adapters of another library. FileExistsError: something is in `folder`.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"export_merged writes {', '.join(map(str, _FLOATS))}, got dtype={dtype!r}")
    model = _compiled_from(model)
    config: Any = None
    if is_transformers_model(model):
        config = copy.deepcopy(model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = str(dtype).removeprefix("torch.")
    kept = _kept_in_float32(model, dtype)
    _write(model, config, folder, _plain(model, dtype, kept), max_shard_size)


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of most of its floating parameters, counted by elements; float32 where it has none."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _write(
    model: Any, config: Any, folder: str | Path, tensors: Iterable[dict[str, Tensor]], max_shard_size: int | str
) -> None:
    with new_folder(folder) as partial:
        shards = ShardWriter(partial, max_shard_size=max_shard_size)
        for group in tensors:
            for name, tensor in group.items():
                shards.add(name, tensor)
        shards.finish()
        if config is None:
            return
        config.architectures = [type(model).__name__]
        config.save_pretrained(partial)
        if model.can_generate():
            model.generation_config.save_pretrained(partial)
        copy_tokenizer(config._name_or_path, partial)


def _plain(model: nn.Module, dtype: torch.dtype, kept: re.Pattern[str] | None) -> Iterator[dict[str, Tensor]]:
    for group in _by_decoder_layer(_distinct(model)):
        read = {}
        for tensor in group:
            stays = not tensor.trained or (kept is not None and kept.search(tensor.name))
            read[tensor.name] = _cast(tensor, tensor.held.dtype if stays else dtype)
        yield _as_in_files(model, read)


def _quantized(model: nn.Module, layers: dict[str, FrozenLinear]) -> Iterator[dict[str, Tensor]]:
    for group in _by_decoder_layer(_distinct(model)):
        read: dict[str, Tensor] = {}
        for tensor in group:
            owner = tensor.name.rpartition(".")[0]
            if owner in layers:
                read.update(layers[owner].state_dict(prefix=f"{owner}."))
            else:
                read[tensor.name] = tensor.read()
        yield _as_in_files(model, read)


def _cast(tensor: PlainTensor, dtype: torch.dtype) -> Tensor:
    value = tensor.read()
    if not value.is_floating_point():
        return value
    value = value.to(dtype)
    if not torch.isfinite(value).all():
        raise ValueError(f"{tensor.name} is not finite in {dtype}: the adapter or the weight is broken")
    return value


def _distinct(model: nn.Module) -> list[PlainTensor]:
    """Tied weights once, under the name by which transformers ties the others to it."""
    tensors = list(plain_tensors(model))
    named = {tensor.name: tensor for tensor in tensors}
    targets = getattr(model, "all_tied_weights_keys", None) or {}
    taken: dict[int, PlainTensor] = {}
    for tensor in tensors:
        source = named.get(targets.get(tensor.name, ""))
        chosen = tensor if source is None or source.held is not tensor.held else source
        first = taken.setdefault(id(tensor.held), chosen)
        if first.adapted != tensor.adapted:
            raise ValueError(
                f"{first.name} and {tensor.name} are one weight, and only one of them has an adapter: merged they "
                "would differ. Set tie_word_embeddings=False before adding LoRA, or adapt neither"
            )
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return [tensor for tensor in tensors if taken[id(tensor.held)] is tensor and tensor.name not in ignored]


def _by_decoder_layer(tensors: Iterable[PlainTensor]) -> Iterator[list[PlainTensor]]:
    """Runs of tensors whose names begin alike up to the first number: what a file calls otherwise is within one."""
    for _, group in itertools.groupby(tensors, lambda tensor: re.match(r".*?\.\d+\.|", tensor.name)[0]):  # type: ignore[index]
        yield list(group)


def _as_in_files(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names, and in the shapes, that the files of transformers' models have."""
    if not is_transformers_model(model):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    with names_of_files(model):
        return revert_weight_conversion(model, tensors)  # type: ignore[arg-type]


def _kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Weights that transformers loads in float32 whatever the dtype is."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None


def _frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    return {name: x for name, x in named_modules(model) if isinstance(x, FrozenLinear) and is_frozen_layer(x)}


def _check_savable(model: nn.Module, layers: dict[str, FrozenLinear]) -> None:
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError(
            "the model has LoRA layers, which the files of bitsandbytes cannot hold: save the adapter with "
            "lq_plugin.adapters.save_adapter, or merge it with remove_lora(model), or use export_merged"
        )
    if not layers:
        raise ValueError("the model has no frozen layer: convert it first, or use save_pretrained")
    for name, layer in layers.items():
        if isinstance(layer, Linear4bit):
            try:
                layer.rows.check_exportable()
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be saved for bitsandbytes: {error}") from error


def _compiled_from(model: nn.Module) -> nn.Module:
    """The model that torch.compile wraps."""
    return getattr(model, "_orig_mod", model)
