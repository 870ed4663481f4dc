"""Which layers of a model get an adapter, and what trains beside them.

Names are those of the model without adapters, as PEFT writes them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lq_plugin.adapter_checkpoint import accept_without_base
from lq_plugin.layers.experts import FrozenExpertWeight
from lq_plugin.layers.lora import LoRAEmbedding, LoRALayer, LoRALinear
from lq_plugin.layers.lora_experts import LoRAExperts
from lq_plugin.lora_config import ALL_LINEAR, LoRAConfig, ends_with, matches, patterns
from lq_plugin.structure import is_embedding, is_linear, named_modules, unwanted

# The heads that PEFT trains whole for a task, where the model has them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by name."""
    return {name: module for name, module in named_modules(model) if isinstance(module, LoRALayer)}


def with_heads(config: LoRAConfig, model: nn.Module) -> LoRAConfig:
    names = {name.rpartition(".")[2] for name, _ in named_modules(model)}
    heads = [h for h in _HEADS.get(config.task_type or "", ()) if h in names and h not in config.modules_to_save]
    return replace(config, modules_to_save=(*config.modules_to_save, *heads)) if heads else config


def adapter(module: nn.Module, config: LoRAConfig, name: str, dtype: torch.dtype) -> LoRALayer:
    """A layer with an adapter around `module`, as the config says for a layer of that name."""
    options: dict[str, Any] = {
        "r": config.rank(name),
        "lora_alpha": config.alpha(name),
        "use_rslora": config.use_rslora,
        "init_lora_weights": config.init_lora_weights,
        "dtype": dtype,
    }
    layer: LoRALayer
    if config.use_dora and (is_embedding(module) or isinstance(module, FrozenExpertWeight)):
        raise ValueError(f"use_dora beside {name!r}, which is no linear, is not supported: leave it out of the targets")
    if is_embedding(module):
        layer = LoRAEmbedding(module, **options)
    elif isinstance(module, FrozenExpertWeight):
        layer = LoRAExperts(module, **options)
    else:
        layer = LoRALinear(module, lora_dropout=config.lora_dropout, use_dora=config.use_dora, **options)
    layer.config = config
    return layer.train(module.training)


@contextmanager
def trains_as_before_on_error(model: nn.Module) -> Iterator[None]:
    """A layer is frozen as it gets its adapter; where one of them then fails, all train again that did."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)
        raise


def attach(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Puts each layer in the place of its base, wherever that stands in the model."""
    around = {id(layer.base_layer): layer for layer in layers.values()}
    for parent, child_name, child in children(model):
        if id(child) in around:
            parent._modules[child_name] = around[id(child)]
    accept_without_base(model)


def train_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Freezes the model but for its adapters, the biases that the config names and modules_to_save."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    for module in check_saved_whole(model, config).values():
        module.requires_grad_(True)


def modules_saved_whole(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that modules_to_save names, without those inside of another."""
    found = {n: m for n, m in named_modules(model) if any(n.endswith(end) for end in config.modules_to_save)}
    return {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}


def targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers that get an adapter by name, one name each; ValueError for one that is asked for and cannot."""
    _check_names(model, config)
    if is_linear(model):
        raise ValueError("the model itself is a linear, which cannot be replaced: put it in a module of its own")
    if any("base_layer" in module._modules for module in model.modules()):
        raise ValueError("the model has adapters of another library already: merge or unload them first")
    everything = config.target_modules is not None and ALL_LINEAR in patterns(config.target_modules)
    skipped = unwanted(model) if everything else {}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        name = name.replace("_orig_mod.", "")
        if isinstance(module, FrozenExpertWeight):
            asked = any(matches(p, name, ()) for p in config.target_parameters) or _asked(name, config)
        else:
            asked = config.targets(name) and id(module) not in skipped and (is_linear(module) or _asked(name, config))
        reason = _against_adapter(module) if asked else None
        if asked and reason is None:
            found.setdefault(id(module), (name, module))
        elif reason is not None and _named_plainly(name, config):
            raise ValueError(f"{name!r} is in target_modules, but {reason}")
    if not found:
        raise ValueError(
            f"target_modules={config.target_modules!r} and target_parameters={config.target_parameters!r} match no "
            "layer that could have an adapter; experts can have one once convert() has frozen them"
        )
    return dict(found.values())


def _against_adapter(module: nn.Module) -> str | None:
    if isinstance(module, FrozenExpertWeight):
        return None
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its weight directly, past any adapter"
    if isinstance(module, nn.EmbeddingBag) or not (is_linear(module) or is_embedding(module)):
        return f"a {type(module).__name__} cannot have one: expected linears and embeddings"
    return None


def _asked(name: str, config: LoRAConfig) -> bool:
    """Whether a pattern other than "all-linear" matches, and nothing excludes the module."""
    spec = config.target_modules
    return config.targets(name) and any(matches(p, name, spec) for p in patterns(spec) if p != ALL_LINEAR)


def _named_plainly(name: str, config: LoRAConfig) -> bool:
    """Whether a pattern names the module; what a glob or an expression reaches as well was not asked for."""
    names = [p for p in patterns(config.target_modules) if re.fullmatch(r"[\w.\-]+", p) and p != ALL_LINEAR]
    return any(matches(pattern, name, ()) for pattern in names)


def _check_names(model: nn.Module, config: LoRAConfig) -> None:
    """ValueError for whatever the user wrote that matches nothing."""
    names = [name.replace("_orig_mod.", "") for name, _ in model.named_modules(remove_duplicate=False)]
    kinds = {
        "target_modules": lambda pattern, name: matches(pattern, name, config.target_modules),
        "exclude_modules": lambda pattern, name: matches(pattern, name, config.exclude_modules),
        "modules_to_save": lambda end, name: name.endswith(end),
        "target_parameters": lambda pattern, name: matches(pattern, name, ()),
    }
    for option, does_match in kinds.items():
        for pattern in patterns(getattr(config, option)):
            if not any(does_match(pattern, name) for name in names):
                endings = ", ".join(sorted({n.rpartition(".")[2] for n, m in named_modules(model) if is_linear(m)}))
                raise ValueError(f"{option}: {pattern!r} matches no module; the names of linears end in: {endings}")


def check_patterns(model: nn.Module, config: LoRAConfig, targets: list[str]) -> None:
    """ValueError for a rank, an alpha or a layer that no adapted layer has."""
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(ends_with(pattern, name) for name in targets):
                raise ValueError(f"{option}: {pattern!r} matches none of the {len(targets)} adapted layers")
    for index in config.layers_to_transform or ():
        if not any(replace(config, layers_to_transform=(index,)).targets(name) for name in targets):
            raise ValueError(f"layers_to_transform: no adapted layer has the index {index}")


def check_alike(name: str, layer: LoRALayer, config: LoRAConfig, where: str) -> None:
    """ValueError unless the adapter of a layer computes what the config describes; where: whose config that is.

    The same tensors under another scale, or beside lengths that are not there, would be another change.
    """
    here = f"r={layer.r}, scale={layer.scale:g}, use_dora={layer.lora_magnitude is not None}"
    there = f"r={config.rank(name)}, scale={config.scale(name):g}, use_dora={config.use_dora}"
    if here != there:
        raise ValueError(
            f"{name!r} has an adapter of {here} in this model, and {there} is {where}: call "
            "lq_plugin.adapters.remove_lora(model) first"
        )


def check_saved_whole(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    modules = modules_saved_whole(model, config)
    inside = {id(p): name for name, module in modules.items() for p in module.parameters()}
    for name, module in modules.items():
        if any(not p.is_floating_point() for p in module.parameters()):
            raise ValueError(f"modules_to_save: {name!r} is quantised and cannot train; add it to skip= of convert")
    owned = {id(m) for module in modules.values() for m in module.modules()}
    for other, module in named_modules(model):
        for parameter in module.parameters(recurse=False) if id(module) not in owned else ():
            if id(parameter) in inside:
                raise ValueError(
                    f"modules_to_save: {inside[id(parameter)]!r} is tied to {other!r}, which would change with it: "
                    "name both, or neither"
                )
    return modules


def children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every parent, name of a child in it, and child; a child that stands in several places comes several times."""
    return [(m, n, child) for m in list(model.modules()) for n, child in m._modules.items() if child is not None]
