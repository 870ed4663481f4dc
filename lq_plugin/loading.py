"""Models that are quantised while their files are read: the peak is the quantised model and one layer.

`load_pretrained` reads transformers' models, `load_weights` any nn.Module that was built on the meta device. A layer
goes to its device in the dtype of the model, is quantised there, and its float weight is dropped before the next one
is read. Nothing is unpickled.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lq_plugin.bitsandbytes_config import Prequantized
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.layer_progress import LayerProgress
from lq_plugin.lora_config import LoRAConfig
from lq_plugin.policy import LinearSpec, Policy
from lq_plugin.structure import disable_fast_paths
from lq_plugin.transformers_models import tell_transformers
from lq_plugin.weights_loading import layers_to_freeze, load_weights, target_device

if TYPE_CHECKING:
    from lq_plugin.freezing_quantizer import Freezing
    from lq_plugin.pretrained_source import PretrainedSource

__all__ = ["load_pretrained", "load_weights"]


def load_pretrained(
    source: str | Path,
    linear: LinearSpec = "nf4",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip: Iterable[str] = (),
    lora: object | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> nn.Module:
    """A transformers model in eval mode on `device`, its linears frozen in `linear`, as `convert` would have made it.

    source: a folder with config.json and safetensors, or a hub name, which is downloaded when it is new. Its layers may
    be quantised already by bitsandbytes: they are read as they are, and `linear` has to name their element type.
    linear, skip, lora: as for `convert`; formats that train are not for here. device: None is the GPU if there is one.
    dtype: of all that is not quantised; None is what config.json says.
    cache: a folder where the quantised model is kept, for later calls with the same files, format, dtype and version;
    they read a quarter of the bytes. One that is not whole is made again, and a line says so. progress: a bar over the
    layers, where stderr is a terminal.

    FileNotFoundError: no such folder, file or name. ValueError: files that are cut short, or lack tensors of the model,
    or hold others; a model without linears, or not known to transformers; a file in another format than `linear`.
    """
    from lq_plugin.freezing_quantizer import Freezing
    from lq_plugin.pretrained_source import PretrainedSource

    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    policy = Policy.of(linear, skip)
    lora = None if lora is None else LoRAConfig.of(lora)
    found = PretrainedSource.of(source, dtype)
    quantized = found.quantization_config
    with LayerProgress(f"Loading {Path(found.name).name}", progress) as bar:
        freezing = Freezing(lambda model: layers_to_freeze(model, linear, skip), target_device(device), bar)
        if quantized is not None:
            freezing.prequantized = Prequantized.of(quantized, lambda name: _wanted(policy, name))
            model = found.load(freezing)
        elif cache is not None:
            model = _cached(cache, found, freezing, repr((linear, skip)))
        else:
            model = found.load(freezing)
    if quantized is not None and not freezing.frozen:
        raise ValueError(f"config.json of {found.name} speaks of quantised layers, and its files hold none")
    disable_fast_paths(model)
    tell_transformers(model)
    if lora is not None:
        from lq_plugin.adapters import add_lora

        add_lora(model, lora)
    return model


def _wanted(policy: Policy, name: str) -> FrozenFormat | None:
    format = policy.decide(name)[0]
    return format if isinstance(format, FrozenFormat) else None


def _cached(cache: str | Path, source: "PretrainedSource", freezing: "Freezing", request: str) -> nn.Module:
    from lq_plugin.quantized_cache import QuantizedCache

    kept = QuantizedCache.of(cache, source, request)
    model = kept.load(lambda stored: replace(freezing, stored=stored, frozen={}))
    return kept.fill(source.load(freezing)) if model is None else model
