"""What PEFT calls the tensors of an adapter, and the shapes that it keeps them in.

    linear     <layer>.lora_A.weight (r, I), <layer>.lora_B.weight (O, r), <layer>.lora_magnitude_vector (O,)
    embedding  <layer>.lora_embedding_A (r, V), <layer>.lora_embedding_B (D, r)
    experts    <module>.lora_A.weight (E r, I), <module>.lora_B.weight (O, r E), with `.base_layer` after the module for
               all but the last of its adapted parameters: in PEFT each wraps the one before
    bias       <layer>.base_layer.bias of adapted layers, <layer>.bias of others

In files all names start with `base_model.model.`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lq_plugin.layers.lora import LoRAEmbedding, LoRALayer
from lq_plugin.layers.lora_experts import LoRAExperts
from lq_plugin.lora_placement import modules_saved_whole
from lq_plugin.structure import named_modules

FACTORS = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B", ".lora_magnitude_vector": "lora_magnitude"}
_EMBEDDING_FACTORS = {".lora_embedding_A": "lora_A", ".lora_embedding_B": "lora_B"}


def split(key: str) -> tuple[str, str | None]:
    """A key without PEFT's prefix -> the name of the layer and lora_A, lora_B or lora_magnitude; else key and None."""
    for suffix, factor in (FACTORS | _EMBEDDING_FACTORS).items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), factor
    return key, None


def peft_tensors(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    """All that trains, by PEFT's names without its prefix."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        suffixes = _EMBEDDING_FACTORS if isinstance(layer, LoRAEmbedding) else FACTORS
        factors = {n: t for n in suffixes.values() if (t := getattr(layer, n)) is not None}
        if isinstance(layer, LoRAExperts):
            factors = {n: as_peft(t, n) for n, t in factors.items()}
        place = _place_in_peft(name, layers)
        tensors |= {f"{place}{s}": factors[n] for s, n in suffixes.items() if n in factors}
    config = next(iter(layers.values())).config
    whole = modules_saved_whole(model, config)
    for name, module in whole.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    if config.bias != "none":
        for name, module in named_modules(model):
            bias = module._parameters.get("bias")
            if bias is not None and bias.requires_grad and not any(f"{name}.".startswith(f"{w}.") for w in whole):
                level = "base_layer." if name in layers else ""
                tensors[f"{name}.{level}bias"] = bias
    return tensors


def peft_targets(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """The whole names, or where PEFT would take one for a suffix of another, an expression for exactly them.

    PEFT refuses dropout beside parameters of experts; for what the saved tensors compute it does not matter.
    """
    parameters = sorted(name for name, layer in layers.items() if isinstance(layer, LoRAExperts))
    targets = sorted(layers.keys() - set(parameters))
    others = [f".{name}" for name, _ in named_modules(model) if name not in layers]
    taken = any(other.endswith(f".{target}") for target in targets for other in others)
    return {
        "target_modules": "|".join(map(re.escape, targets)) if taken else targets,
        "target_parameters": parameters or None,
    } | ({"lora_dropout": 0.0} if parameters else {})


def _place_in_peft(name: str, layers: Mapping[str, LoRALayer]) -> str:
    if not isinstance(layers[name], LoRAExperts):
        return name
    path, _, last = name.rpartition(".")
    beside = [n.rpartition(".")[2] for n in layers if n.rpartition(".")[0] == path]
    return nesting(path, beside)[beside.index(last)]


def nesting(path: str, names: Sequence[str]) -> list[str]:
    """Where PEFT keeps the adapters of several parameters of one module: each wraps the one before."""
    return [path + ".base_layer" * (len(names) - 1 - i) for i in range(len(names))]


def by_expert(tensor: Tensor, factor: str, experts: int) -> Tensor:
    """PEFT's A (E r, I) -> (E, r, I), its B (O, r E) -> (E, O, r); one that does not divide so stays what it is."""
    if tensor.ndim != 2 or tensor.shape[factor == "lora_B"] % experts:
        return tensor
    if factor == "lora_A":
        return tensor.view(experts, -1, tensor.shape[1])
    return tensor.view(tensor.shape[0], -1, experts).permute(2, 0, 1)


def as_peft(tensor: Tensor, factor: str) -> Tensor:
    """The inverse of `by_expert`."""
    if factor == "lora_A":
        return tensor.flatten(0, 1)
    return tensor.permute(1, 2, 0).flatten(1)
