"""transformers' loader with our layers: each weight is frozen as it comes from the file, on the device it is for.

transformers builds the model on the meta device, renames and fuses what a file calls otherwise, ties, restores
buffers and reads one weight after another; a quantizer is told of each weight before it is placed. Ours freezes it,
keeps the frozen layer aside and leaves an empty tensor in its place; when all is read, the frozen layers take the
places of the linears. So a weight exists in 16 bits only while its layer is frozen.

This module imports transformers; nothing imports it before a model is loaded.

Source: https://huggingface.co/docs/transformers/quantization/contribute
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lq_plugin.bitsandbytes_config import Prequantized
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.frozen_tensors import frozen_weights, restored, take_place
from lq_plugin.layer_progress import LayerProgress
from lq_plugin.safetensors_files import TensorFiles, TensorReader

METHOD = "lq_plugin"


@dataclass(eq=False)
class Freezing:
    """What a load is to freeze, what it reads from elsewhere, and what it froze.

    plan: the model on the meta device -> {name of a layer: its format}. prequantized: the files hold layers that are
    quantised, and the plan is read from them. stored: the entries of the planned layers, which the files do not hold.
    """

    plan: Callable[[nn.Module], Mapping[str, FrozenFormat]]
    device: torch.device
    progress: LayerProgress
    prequantized: Prequantized | None = None
    stored: TensorFiles | None = None
    frozen: dict[str, nn.Module] = field(default_factory=dict)

    def add(self, name: str, layer: nn.Module) -> None:
        self.frozen[name] = layer
        self.progress.advance()


class LayerError(BaseException):
    """reason: what went wrong in a layer.

    No Exception: transformers would note it, give all that is missing random values in 16 bits, and only then raise.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def _at_once() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LayerError(error) from error


@register_quantization_config(METHOD)
class FreezingConfig(QuantizationConfigMixin):
    """Carries a Freezing through from_pretrained; it is removed from the model when the model is loaded."""

    def __init__(self, freezing: Freezing) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.freezing = freezing

    def __deepcopy__(self, memo: dict[int, Any]) -> "FreezingConfig":
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class FreezingQuantizer(HfQuantizer):
    def __init__(self, quantization_config: FreezingConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.freezing = quantization_config.freezing
        self.pre_quantized = self.freezing.prequantized is not None
        self.formats: dict[str, FrozenFormat] = {}
        self.weights: dict[str, tuple[str, ...]] = {}  # of the layers in `formats`

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.formats = {} if self.pre_quantized else dict(self.freezing.plan(model))
        self.weights = {name: frozen_weights(model.get_submodule(name)) for name in self.formats}
        self.freezing.progress.expect(len(self.formats) or None)
        if self.freezing.stored is not None:
            with self.freezing.stored.reader() as reader:
                for name, format in self.formats.items():
                    self.freezing.add(name, _stored(name, model.get_submodule(name), format, self.freezing, reader))
                    model.set_submodule(name, nn.Identity())

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, attribute = param_name.rpartition(".")
        return name in self.freezing.frozen or attribute in self.weights.get(name, ())

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """What the allocator is warmed up for: it must not be more than the model takes in the end."""
        name, _, attribute = param_name.rpartition(".")
        return self.formats[name].bits / 8 if attribute in self.weights.get(name, ()) else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Freeze(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        prequantized = self.freezing.prequantized
        return [] if prequantized is None else [WeightConverter([*prequantized.names], "weight", [_Restore(self)])]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, frozen in self.freezing.frozen.items():
            _put(model, name, frozen, self.weights.get(name, ("weight",)))
        _forget_reading(model, self.freezing)
        self.remove_quantization_config(model)
        return model


class _Freeze(ConversionOps):
    """A weight in 16 or 32 bits, renamed and fused -> its place holder; its layer is frozen once it has all of them."""

    def __init__(self, hf_quantizer: FreezingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        with _at_once():
            return {name: self._place(name, _single(value), model) for name, value in input_dict.items()}

    def _place(self, full_name: str, weight: Tensor, model: nn.Module) -> Tensor:
        quantizer, freezing = self.hf_quantizer, self.hf_quantizer.freezing
        name, _, attribute = full_name.rpartition(".")
        module = model.get_submodule(name)
        expected = getattr(module, attribute)
        if weight.shape != expected.shape:
            raise ValueError(f"{full_name} has shape {tuple(weight.shape)}, the model has {tuple(expected.shape)}")
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
        weights = quantizer.weights[name]
        if any(getattr(module, other).is_meta for other in weights):
            return getattr(module, attribute)
        freezing.add(name, quantizer.formats[name].freeze(module))
        for other in weights:
            setattr(module, other, _place_holder())
        return getattr(module, attribute)


class _Restore(ConversionOps):
    """The entries of a layer that bitsandbytes quantised -> its place holder; a plain weight stays what it is."""

    def __init__(self, hf_quantizer: FreezingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        freezing = self.hf_quantizer.freezing
        with _at_once():
            entries = {name: _single(value) for name, value in input_dict.items()}
            name = full_layer_name.rpartition(".")[0]
            module = model.get_submodule(name)
            expected = model.get_parameter_or_buffer(full_layer_name)  # type: ignore[operator]
            if len(entries) == 1 and entries.get("weight", expected).is_floating_point():
                return {"weight": entries["weight"].to(expected.dtype)}
            assert freezing.prequantized is not None
            format = freezing.prequantized.format_of(name, entries)
            freezing.add(name, restored(name, module, format, entries, freezing.device))
            return {"weight": _place_holder()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Restore":
        """transformers copies an operation for each tensor; all of them add to one Freezing."""
        return self

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def _single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _place_holder() -> nn.Parameter:
    """transformers gives a value to whatever is not marked as having one."""
    parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def _put(model: nn.Module, name: str, frozen: nn.Module, weights: tuple[str, ...]) -> None:
    """A bias may have been read after the weight."""
    old = model.get_submodule(name)
    for attribute, parameter in old.named_parameters(recurse=False):
        if attribute not in weights:
            setattr(frozen, attribute, parameter)
    take_place(old, frozen)


def _stored(name: str, module: nn.Module, format: FrozenFormat, freezing: Freezing, reader: TensorReader) -> nn.Module:
    prefix = f"{name}."
    entries = {key: reader.read(key, freezing.device) for key in reader.names if key.startswith(prefix)}
    return restored(name, module, format, {k.removeprefix(prefix): x for k, x in entries.items()}, freezing.device)


def _forget_reading(model: nn.Module, freezing: Freezing) -> None:
    """transformers keeps how it read a model to undo it when it saves one.

    Quantised entries are ours to write. A cache holds the names of the model: what its files have is as for a new one.
    """
    read = model.__dict__.pop("_weight_conversions", None)
    if read is not None and freezing.stored is None:
        model._weight_conversions = [x for x in read if not _restores(x)]  # type: ignore[assignment]


def _restores(conversion: Any) -> bool:
    return any(isinstance(operation, _Restore) for operation in getattr(conversion, "operations", ()))
