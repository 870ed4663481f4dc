"""The tensors of a model as if nothing had been quantised or adapted: names, shapes and layouts of the model it was.

A frozen layer gives its weight read back, a LoRA layer the weight of its base with the change in it. Nothing is
computed before a tensor is asked for, and the model stays as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lq_plugin.layers.experts import FrozenExpertWeight
from lq_plugin.layers.frozen import FrozenWeight
from lq_plugin.layers.lora import LoRALayer


@dataclass(frozen=True)
class PlainTensor:
    """name: without the levels that LoRA and torch.compile put in. read: computes it.

    held: the tensor it is read from, as an identity.
    trained: a parameter, and not a buffer. adapted: with the change of a LoRA layer in it.
    """

    name: str
    read: Callable[[], Tensor]
    held: Tensor
    trained: bool = True
    adapted: bool = False


def plain_tensors(model: nn.Module) -> Iterator[PlainTensor]:
    """Parameters and persistent buffers in the order of the modules; a tensor that two names share comes twice.

    TypeError: adapters of another library, which cannot be merged here.
    """
    yield from _of(model, "")


def _of(module: nn.Module, prefix: str) -> Iterator[PlainTensor]:
    if isinstance(module, LoRALayer):
        yield from _adapted(module, prefix)
    elif isinstance(module, FrozenWeight):
        yield from _frozen(module, prefix)
    elif isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):
        yield from _of(compiled, prefix)
    elif "base_layer" in module._modules:
        raise TypeError(
            f"{prefix.rstrip('.')!r} is a {type(module).__name__}, an adapter of another library: merge it there first "
            "(in PEFT, merge_and_unload), or load it with lq_plugin.adapters.load_adapter"
        )
    else:
        yield from _own(module, prefix)
        for name, child in module.named_children():
            yield from _of(child, f"{prefix}{name}.")


def _own(module: nn.Module, prefix: str) -> Iterator[PlainTensor]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield PlainTensor(f"{prefix}{name}", parameter.detach, parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield PlainTensor(f"{prefix}{name}", buffer.detach, buffer, trained=False)


def _frozen(layer: FrozenWeight, prefix: str) -> Iterator[PlainTensor]:
    yield PlainTensor(
        _weight_name(layer, prefix), partial(_in_layout, layer, partial(layer.dequantize, torch.float32)), layer.weight
    )
    for name, parameter in layer._parameters.items():
        if parameter is not None and name not in (*layer.codes, "weight"):
            yield PlainTensor(f"{prefix}{name}", parameter.detach, parameter)


def _adapted(layer: LoRALayer, prefix: str) -> Iterator[PlainTensor]:
    base = list(_of(layer.base_layer, prefix))
    weight = _weight_name(layer.base_layer, prefix)
    for tensor in base:
        if tensor.name == weight and not layer.merged:
            read = partial(_in_layout, layer.base_layer, layer.adapted_weight)
            yield PlainTensor(weight, read, tensor.held, adapted=True)
        else:
            yield tensor


def _weight_name(layer: nn.Module, prefix: str) -> str:
    """Fused experts are parameters themselves, without a module around each."""
    return prefix.rstrip(".") if isinstance(layer, FrozenExpertWeight) else f"{prefix}weight"


@torch.no_grad()
def _in_layout(layer: nn.Module, read: Callable[[], Tensor]) -> Tensor:
    """In the layout of the layer that was frozen: Conv1D and some experts have (I, O)."""
    weight = read()
    return weight.transpose(-2, -1) if isinstance(layer, FrozenWeight) and layer.transposed else weight
