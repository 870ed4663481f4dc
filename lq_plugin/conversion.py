"""Gives the layers of a model a format, in place, and says what became of each of them.

A layer is converted by changing what its module is: the class for a format that trains, which keeps the parameters;
class and contents for one that is frozen. So the model, its names, its hooks and whoever holds a layer see the same
modules as before.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lq_plugin.auto_format import Device, training_device
from lq_plugin.formats import Format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.gemm import GemmFormats
from lq_plugin.frozen_tensors import take_place
from lq_plugin.layer_plan import Conversion, Layer, check_share, conversion_of, planned
from lq_plugin.layers.experts import FrozenExperts, projections
from lq_plugin.layers.linear import QuantConv1D, QuantLinear, is_conv1d
from lq_plugin.policy import LinearSpec, Policy
from lq_plugin.structure import disable_fast_paths, is_linear
from lq_plugin.transformers_models import tell_transformers

__all__ = ["Conversion", "Layer", "LinearSpec", "convert", "frozen_plan", "report_of"]


def convert(
    model: nn.Module,
    linear: LinearSpec = "int8_switchback",
    *,
    skip: Iterable[str] = (),
    lora: object | None = None,
    partial: bool = False,
    device: torch.device | str | None = None,
) -> Conversion:
    """Converts the linear layers of a model in place; printing what it returns shows a table.

    linear: a format name or object, or {name pattern: format}, where the first match wins; None converts nothing.
    "auto", or an Auto, in place of a format chooses one for each layer by device and shape, where that is faster.
    skip: patterns of layers to leave alone, on top of those that always are: tied weights, the output embedding,
    routers and the projections inside MultiheadAttention. lora: a LoRAConfig or peft.LoraConfig; adapters beside frozen
    layers, after which nothing else of the model trains. partial: accept that less than half of the weights convert.
    device: where weights are frozen, one after another, and stay; None is where they are. "auto" chooses for it; there
    None is where the model is, but the GPU, if there is one, for a model that is still on the CPU.

    Formats that are frozen also take transformers' Conv1D and fused experts. A layer that an earlier call gave a format
    that trains goes back to 16 bits where it is skipped or its format is None; a frozen one stays.

    Nothing is changed when it raises, but where `lora` fits no fused experts, which shows once they are frozen.
    ValueError: an unknown format; a pattern that matches no layer; nothing to convert, or less than half of the weights
    outside the embeddings converted, where it is not "auto" that left them alone; a weight that is quantised already,
    by another library or in another format; lora without a frozen format; a table of another device than the model's.
    RuntimeError: "auto" on a GPU that cannot train in 8 bits.
    """
    policy = policy_on(model, Policy.of(linear, skip), device)
    lora = checked_lora(lora, policy)
    conversion = planned(model, policy)
    if policy.converts:
        check_share(conversion, partial)
    config = None if lora is None else _fitting_lora(conversion, model, lora)
    freezing = [layer for layer in conversion.layers if layer.frozen is None and _is_frozen(layer.formats)]
    for layer in conversion.layers:
        if not _is_frozen(layer.formats):
            _give(layer.module, layer.formats)
    for module, format in {id(layer.module): (layer.module, layer.formats) for layer in freezing}.values():
        assert isinstance(format, FrozenFormat)
        take_place(module, format.freeze(module, device))
    if conversion.converted:
        disable_fast_paths(model)
    if freezing:
        tell_transformers(model)
    if config is not None:
        _adapt(model, config)
    return conversion if config is None and not freezing else conversion_of(model, policy)


def report_of(model: nn.Module) -> Conversion:
    """What became of a model's layers earlier; nothing is changed."""
    return conversion_of(model, Policy.of({}, ()))


def frozen_plan(model: nn.Module, linear: LinearSpec, skip: Iterable[str] = ()) -> dict[str, FrozenFormat]:
    """name of a module -> the format that `convert` would freeze it in; nothing is changed, and no value is read.

    The names are those of model.named_modules(). Errors are those of `convert`, and a format that trains is one.
    """
    policy = Policy.of(linear, skip)
    trained = [format.name for _, format in policy.rules if isinstance(format, GemmFormats)] + ["auto"] * policy.is_auto
    if trained:
        raise ValueError(
            f"{', '.join(trained)} trains the weights it multiplies: expected frozen formats (nf4, fp4, …)"
        )
    plan = {id(layer.module): layer.formats for layer in planned(model, policy).converted if layer.frozen is None}
    formats = ((name, plan.get(id(module))) for name, module in model.named_modules())
    return {name: format for name, format in formats if isinstance(format, FrozenFormat)}


def policy_on(model: nn.Module, policy: Policy, device: torch.device | str | None) -> Policy:
    """The policy with "auto" told where the model trains; see `convert` for `device`."""
    return policy.on(Device.of(training_device(model, device))) if policy.is_auto else policy


def checked_lora(lora: object | None, policy: Policy) -> object | None:
    """The LoRAConfig of whatever describes one; ValueError beside a policy that freezes nothing."""
    if lora is None:
        return None
    if not policy.freezes:
        raise ValueError("lora needs a frozen base format (nf4, fp4, llm_int8) in `linear`; or leave lora=None")
    from lq_plugin.lora_config import LoRAConfig

    return LoRAConfig.of(lora)


def has_layers(model: nn.Module) -> bool:
    """Whether there is a linear or fused experts in it."""
    return any(is_linear(m) or projections(m) or isinstance(m, FrozenExperts) for m in model.modules())


def _is_frozen(format: Format | None) -> bool:
    return isinstance(format, FrozenFormat)


def _give(module: nn.Module, formats: Format | None) -> None:
    """Changes the class of a layer to one with a format that trains, or back to the one that it had."""
    if formats is not None:
        if not isinstance(module, QuantLinear | QuantConv1D):
            module.converted_from = type(module)  # type: ignore[assignment]
            module.__class__ = QuantConv1D if is_conv1d(module) else QuantLinear
        module.formats = formats  # type: ignore[assignment]
    elif "converted_from" in module.__dict__:
        module.__class__ = module.__dict__.pop("converted_from")
        del module.formats


def _fitting_lora(conversion: Conversion, model: nn.Module, config: Any) -> object | None:
    """The config, or None where an earlier call adapted the model so; raises before anything is changed.

    Patterns for the adapters of fused experts can be checked only when those are frozen.
    """
    from lq_plugin.lora_placement import check_alike, check_patterns, check_saved_whole, lora_layers, targets

    present = lora_layers(model)
    if present:
        for name, adapter in present.items():
            check_alike(name, adapter, config, "asked for")
        return None
    converted = {id(layer.module): layer for layer in conversion.converted}
    for name, saved in check_saved_whole(model, config).items():
        for layer in (converted[id(m)] for m in saved.modules() if id(m) in converted):
            raise ValueError(
                f"modules_to_save: {name!r} would be quantised in {layer.formats.name} and could not train; "  # type: ignore[union-attr]
                f"pass skip={layer.name!r}"
            )
    if not any(layer.projection for layer in conversion.layers):
        check_patterns(model, config, list(targets(model, config)))
    return config


def _adapt(model: nn.Module, config: object) -> None:
    from lq_plugin.adapters import add_lora

    add_lora(model, config)
