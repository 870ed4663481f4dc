"""What the layers of a model are, told by its structure: embeddings, routers, ties, and linears that cannot convert."""

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from lq_plugin.layers.experts import expert_weights
from lq_plugin.layers.frozen import FrozenLinear
from lq_plugin.layers.linear import QuantLinear, is_conv1d

# Levels that torch.compile and LoRA put between a layer and the name its user knows.
_LEVELS = ("_orig_mod", "base_layer")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names as the user wrote them: without the levels that torch.compile and LoRA put in."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in _LEVELS), module


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False))


def embedding_parameters(model: nn.Module) -> set[int]:
    """ids of the weights of the input and output embeddings."""
    modules = [m for m in model.modules() if is_embedding(m)] + output_embeddings(model)
    return {id(m.weight) for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)}


def output_embeddings(model: nn.Module) -> list[nn.Module]:
    """What get_output_embeddings() of a part of the model returns, and the linears called lm_head."""
    declaring = (m for m in model.modules() if callable(getattr(m, "get_output_embeddings", None)))
    found = [m.get_output_embeddings() for m in declaring]  # type: ignore[operator]
    found += [m for name, m in named_modules(model) if name.rpartition(".")[2] == "lm_head"]
    return [m for m in found if isinstance(m, nn.Module)]


def impossible(model: nn.Module) -> dict[int, str]:
    """id of a linear or of experts -> why they cannot be converted, even by name."""
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    reasons = {}
    for name, module in named_modules(model):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append((name, module))
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            reasons[id(module)] = "MultiheadAttention reads its weight directly"
        elif is_linear(module) and "weight" not in module._parameters:
            reasons[id(module)] = "its weight is computed from other parameters"
        elif _is_foreign_subclass(module):
            reasons[id(module)] = f"{type(module).__name__} is a subclass of nn.Linear"
    for users in owners.values():
        for name, module in users if len(users) > 1 else ():
            reasons[id(module)] = f"tied to {', '.join(other for other, _ in users if other != name)}"
    return reasons | {id(module): "part of an adapter" for module in _adapters(model)}


def _is_foreign_subclass(module: nn.Module) -> bool:
    known = isinstance(module, QuantLinear | FrozenLinear) or type(module) is nn.Linear
    return isinstance(module, nn.Linear) and not known


def _adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Linears beside a base_layer: LoRA's factors in PEFT."""
    for parent in model.modules():
        base = parent._modules.get("base_layer")
        if base is not None:
            inside = {id(module) for module in base.modules()}
            yield from (m for m in parent.modules() if is_linear(m) and id(m) not in inside)


def quantized_elsewhere(module: nn.Module) -> str | None:
    """What holds the weight of a linear that another library quantised: the name of its class, else None."""
    weight = getattr(module, "weight", None)
    if isinstance(module, FrozenLinear) or not isinstance(weight, nn.Parameter):
        return None
    if not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params"):
        return f"{type(module).__name__} with {weight.dtype}"
    inner = type(weight.data)
    return inner.__name__ if inner.__module__.partition(".")[0] == "torchao" else None


def unwanted(model: nn.Module) -> dict[int, str]:
    """id of a linear -> why it is left alone unless it is named in full."""
    reasons = {id(router): "router" for parent in model.modules() for router in _routers(parent)}
    return reasons | {id(module): "output embedding" for module in output_embeddings(model)}


def _routers(parent: nn.Module) -> Iterator[nn.Module]:
    """Linear layers with one output for each of the experts beside them."""
    beside = [child for name, child in parent.named_children() if "expert" in name]
    experts = {len(child) for child in beside if isinstance(child, nn.ModuleList)}
    experts |= {p.shape[0] for child in beside for p in child.parameters(recurse=False) if p.dim() == 3}
    experts |= {weight.num_experts for child in beside for weight in expert_weights(child).values()}
    for child in parent.children():
        if isinstance(child, nn.Linear) and child.out_features in experts:
            yield child


def disable_fast_paths(model: nn.Module) -> None:
    """In eval nn.TransformerEncoderLayer calls one fused operator on its weights, past the forward of its linears."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
