"""Adapters in PEFT's folders: adapter_model.safetensors and adapter_config.json, which either side reads.

Beside what PEFT knows, the header of our tensor file holds the fingerprint of the base, a hash of the tensors and the
options that give them their meaning: a changed or mixed-up file is an error.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_plugin.adapter_checkpoint import Fingerprint, fingerprint, parsed
from lq_plugin.layers.experts import FrozenExperts
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.lora import LoRALayer
from lq_plugin.lora_config import LoRAConfig, matches
from lq_plugin.lora_placement import lora_layers, modules_saved_whole
from lq_plugin.new_folder import new_folder
from lq_plugin.peft_names import FACTORS, by_expert, nesting, peft_targets, peft_tensors, split
from lq_plugin.structure import is_conv1d, named_modules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PREFIX = "base_model.model."
# Without these the tensors mean something else.
_MEANING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")


def save_adapter(model: nn.Module, folder: str | Path, base_model: str | None = None) -> None:
    """Writes the adapters, and the biases and modules that train, to a new folder that PEFT's from_pretrained loads.

    base_model: what the config names as the base; by default that of a transformers model. The folder is whole or
    absent. FileExistsError: it is there. ValueError: no adapters, or merged ones.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA layers: call add_lora(model, config) first")
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapters are merged into the weights: unmerge_lora(model) first")
    config = _config_to_save(model, layers, base_model)
    tensors = {
        f"{_PREFIX}{name}": t.detach().cpu().contiguous().clone() for name, t in peft_tensors(model, layers).items()
    }
    options = config.to_peft() | peft_targets(model, layers)
    about = {
        "base": fingerprint(model),
        "tensors": _digest(tensors),
        "options": {name: options[name] for name in _MEANING},
    }
    with new_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, partial / WEIGHTS, {"format": "pt", "lq_plugin": json.dumps(about)})


@dataclass(frozen=True)
class SavedAdapter:
    """A folder that was read and checked. tensors: by name in the model. base: the fingerprint, where there is one."""

    config: LoRAConfig
    tensors: Mapping[str, Tensor]
    base: Fingerprint | None

    @classmethod
    def read(cls, folder: Path) -> "SavedAdapter":
        options = _options(folder)
        config = LoRAConfig.of_saved(options)
        tensors, about = _read_tensors(folder)
        if about is None:
            return cls(config, tensors, None)
        changed = [n for n, value in about["options"].items() if (options.get(n) or None) != (value or None)]
        if changed:
            raise ValueError(
                f"{folder / CONFIG} was changed after the weights were written, or belongs to others: "
                + ", ".join(f"{n} was {about['options'][n]!r} and is {options.get(n)!r}" for n in changed)
            )
        return cls(config, tensors, about["base"])

    def of_experts(self, model: nn.Module) -> "SavedAdapter":
        """PEFT's names and shapes of adapters of experts -> ours, for the experts that the model has."""
        tensors = dict(self.tensors)
        for path, experts in named_modules(model):
            if not isinstance(experts, FrozenExperts):
                continue
            names = [
                n for n in experts.names if any(matches(p, f"{path}.{n}", ()) for p in self.config.target_parameters)
            ]
            for name, level in zip(names, nesting(path, names), strict=True):
                for suffix, factor in FACTORS.items():
                    if f"{level}{suffix}" in tensors:
                        tensor = tensors.pop(f"{level}{suffix}")
                        tensors[f"{path}.{name}{suffix}"] = by_expert(tensor, factor, experts.num_experts)
        return replace(self, tensors=tensors)

    def layers(self) -> set[str]:
        """Names of the layers that have an adapter in the file; ValueError for half an adapter."""
        halves: dict[str, set[str]] = {}
        for key in self.tensors:
            layer, factor = split(key)
            if factor in ("lora_A", "lora_B"):
                halves.setdefault(layer, set()).add(factor)
        for layer, found in halves.items():
            if len(found) < 2:
                raise ValueError(f"the adapter holds {', '.join(found)} of {layer!r} and not the other factor")
        if not halves:
            raise ValueError(f"the adapter holds no LoRA tensors, only {', '.join(list(self.tensors)[:3])}")
        return set(halves)


def _config_to_save(model: nn.Module, layers: Mapping[str, LoRALayer], base_model: str | None) -> LoRAConfig:
    config: LoRAConfig | None = next(iter(layers.values())).config
    if config is None:
        raise ValueError("the LoRA layers were made by hand and have no config: use add_lora(model, config)")
    consistent = all(config.rank(n) == x.r and config.alpha(n) == x.lora_alpha for n, x in layers.items())
    if not consistent:  # its patterns were written for the names of a module around this one
        ranks = {f"^{re.escape(n)}": x.r for n, x in layers.items()}
        alphas = {f"^{re.escape(n)}": x.lora_alpha for n, x in layers.items()}
        config = replace(config, rank_pattern=ranks, alpha_pattern=alphas)
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    return replace(
        config,
        base_model_name_or_path=base_model or named or config.base_model_name_or_path,
        modules_to_save=tuple(modules_saved_whole(model, config)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=(),
        fan_in_fan_out=any(_was_conv1d(layer.base_layer) for layer in layers.values()),
    )


def _was_conv1d(base: nn.Module) -> bool:
    return is_conv1d(base) or (isinstance(base, FrozenLinear) and base.transposed)


def _options(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: expected a folder that save_adapter or PEFT wrote")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds a {type(options).__name__}, expected a JSON object")
    return options


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors by name in the model, and what save_adapter noted beside them."""
    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; pickled files are not read" if (folder / "adapter_model.bin").is_file() else ""
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            note = (file.metadata() or {}).get("lq_plugin")
        about = None if note is None else json.loads(note)
        if about is not None:
            parsed(json.dumps(about["base"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy it again") from error
    if about is not None and about["tensors"] != _digest(tensors):
        raise ValueError(f"{path} was changed after it was written: its tensors differ from their hash. Copy it again")
    if stray := [key for key in tensors if not key.startswith(_PREFIX)]:
        raise ValueError(f"{path} holds {stray[0]!r}; the names of an adapter start with {_PREFIX!r}")
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}, about


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
