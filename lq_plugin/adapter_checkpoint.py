"""Checkpoints of LoRA runs: what is trained, and a fingerprint of the frozen base in the place of the base.

The fingerprint is an entry of the state_dict, so that whoever loads it checks it: a model with adapters reads such a
state_dict under strict=True, a plain model finds an unexpected key. For each frozen tensor it holds dtype, shape and a
hash over bytes at evenly spaced places: another model or another quantisation differs, a change of a few weights may
not. Floating values are hashed as bfloat16, so that a base that is cast between float32 and bfloat16 stays the same
base. The ranks and scales of the adapters stand beside it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.layers.frozen import FrozenWeight
from lq_plugin.layers.lora import LoRALayer

ENTRY = "lora_base_fingerprint"

# Values of a tensor that are hashed.
_SAMPLES = 1024
# Casts between these keep what is hashed: a bfloat16 value is a float32 value.
_COMPARABLE = {"float32", "bfloat16", "float64"}

# What stands for the dtype where an entry is the rank and the scale of an adapter.
_SCALE = "lora_scale"

_ANOTHER = "the adapter belongs to another base"

# name -> [dtype, shape, hash]
Fingerprint = dict[str, list[Any]]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of the frozen tensors of a model, under the names that they have without adapters; waits for the device once."""
    return _describe(dict(_frozen(model)))


def check_base(saved: Mapping[str, Any], model: nn.Module) -> None:
    """ValueError that names the first tensor in which the model's base is not the one of the fingerprint."""
    everything = {key: tensor for key, tensor, _ in _entries(model)}
    present = _describe({key: tensor for key, tensor in everything.items() if plain_name(key) in saved})
    for name, (dtype, shape, _) in saved.items():
        if name not in present:
            raise ValueError(f"{_ANOTHER}: that had {name!r}, which this model does not have")
        dtype_now, shape_now, _ = present[name]
        if list(shape) != list(shape_now) or (dtype != dtype_now and not _both_floating(dtype, dtype_now)):
            was, now = f"{dtype} {tuple(shape)}", f"{dtype_now} {tuple(shape_now)}"
            raise ValueError(f"{_ANOTHER}: {name!r} was {was} there and is {now} here")
    for name, (dtype, _, digest) in saved.items():
        dtype_now, _, digest_now = present[name]
        if digest != digest_now and (dtype == dtype_now or {dtype, dtype_now} <= _COMPARABLE):
            raise ValueError(
                f"{_ANOTHER}: {name!r} has the same shape and other values. Load the weights that the adapter was "
                "trained beside, quantised in the same format"
            )


def keep_trained(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Takes the frozen tensors of adapted parts of a model out of its state_dict and puts in their fingerprints."""
    for prefix, part in adapted_parts(model):
        entry = to_tensor(fingerprint(part) | _scales(part))
        for key, _ in _frozen(part):
            state_dict.pop(f"{prefix}{key}", None)
        state_dict[f"{prefix}{ENTRY}"] = entry


def adapted_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The prefix in the state_dict and the module of each part that add_lora was called on and that has adapters."""
    for name, module in model.named_modules():
        if "_lora_checkpoint" in module.__dict__ and _is_adapted(module):
            yield f"{name}." if name else "", module


def accept_without_base(model: nn.Module) -> None:
    """Lets the model read a state_dict that holds a fingerprint in the place of its frozen tensors."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hands attributes on, and not hooks
    if "_lora_checkpoint" not in model.__dict__:
        model._lora_checkpoint = None
        model.register_load_state_dict_pre_hook(_before_loading)
        model.register_load_state_dict_post_hook(_after_loading)


def _before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes the fingerprint out and checks it before anything is loaded."""
    module._lora_checkpoint = None  # type: ignore[assignment]
    if f"{prefix}{ENTRY}" not in state_dict or not _is_adapted(module):
        return
    saved = from_tensor(state_dict.pop(f"{prefix}{ENTRY}"))
    scales = {name: value for name, value in saved.items() if value[0] == _SCALE}
    _check_scales(scales, module)
    check_base({name: value for name, value in saved.items() if name not in scales}, module)
    names = {f"{prefix}{key}" for key, _ in _frozen(module)}
    if not names & state_dict.keys():
        module._lora_checkpoint = names  # type: ignore[assignment]


def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    """What the fingerprint vouched for is not missing."""
    vouched = module.__dict__["_lora_checkpoint"]
    if vouched:
        incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if key not in vouched]


def _scales(model: nn.Module) -> Fingerprint:
    """Ranks and scales of the adapters: the same factors under another scale are another change of the weight."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))
    return {f"{plain_name(name)}.{_SCALE}": [_SCALE, [layer.r], repr(layer.scale)] for name, layer in layers}


def _check_scales(saved: Fingerprint, model: nn.Module) -> None:
    present = _scales(model)
    for name in saved.keys() & present.keys():
        (_, [r], scale), (_, [r_now], scale_now) = saved[name], present[name]
        if (r, scale) != (r_now, scale_now):
            raise ValueError(
                f"the checkpoint's adapter of {name.removesuffix(f'.{_SCALE}')!r} has r={r}, scale={scale}, this "
                f"model's has r={r_now}, scale={scale_now}: give LoRAConfig the r, lora_alpha and use_rslora of that "
                "run"
            )


def to_tensor(value: Fingerprint) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, sort_keys=True).encode()), dtype=torch.uint8)


def from_tensor(entry: Tensor) -> Fingerprint:
    try:
        return parsed(bytes(entry.cpu().numpy()).decode())
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{ENTRY} is damaged ({error}): take an earlier checkpoint") from error


def parsed(text: str) -> Fingerprint:
    value = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(v, list) and len(v) == 3 for v in value.values()):
        raise ValueError("expected {name: [dtype, shape, hash]}")
    return value


def plain_name(key: str) -> str:
    """The name that a tensor has without adapters and without torch.compile."""
    return key.replace("_orig_mod.", "").replace("base_layer.", "")


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALayer) for module in model.modules())


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((key, tensor) for key, tensor, frozen in _entries(model) if frozen)


def _entries(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Key, tensor and whether it is frozen, of what the state_dict holds, apart from buffers of layers that train.

    Of a quantised layer all but a trained bias is frozen; elsewhere the parameters without a gradient are.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer):
            continue
        own: dict[str, Any] = {}
        module._save_to_state_dict(own, "", False)
        quantized = isinstance(module, FrozenWeight)
        for key, tensor in own.items():
            parameter = module._parameters.get(key)
            trained = parameter is not None and parameter.requires_grad
            if isinstance(tensor, Tensor) and (quantized or parameter is not None):
                yield f"{name}.{key}" if name else key, tensor.detach(), not trained


def _describe(tensors: Mapping[str, Tensor]) -> Fingerprint:
    samples = {key: _sample(tensor) for key, tensor in tensors.items()}
    by_device: dict[torch.device, list[str]] = {}
    for key, sample in samples.items():
        by_device.setdefault(sample.device, []).append(key)
    digests = {}
    for keys in by_device.values():
        together = torch.cat([samples[key] for key in keys]).cpu()
        for key, part in zip(keys, together.split([samples[key].numel() for key in keys]), strict=True):
            digests[key] = hashlib.blake2b(part.numpy().tobytes(), digest_size=8).hexdigest()
    return {plain_name(key): [_name(t.dtype), list(t.shape), digests[key]] for key, t in tensors.items()}


def _sample(tensor: Tensor) -> Tensor:
    """Bytes (at most 8 * _SAMPLES,) of values at evenly spaced places, the first and the last among them."""
    if tensor.is_meta or hasattr(tensor, "to_local"):  # no values here, or only a shard of them
        return torch.empty(0, dtype=torch.uint8)
    flat = tensor.reshape(-1)
    count = min(flat.numel(), _SAMPLES)
    places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
    values = flat[places]
    return (values.to(torch.bfloat16) if values.is_floating_point() else values).view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _both_floating(*names: str) -> bool:
    return all(name.startswith(("float", "bfloat")) and "float8" not in name for name in names)
