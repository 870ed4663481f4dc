"""What a policy makes of each layer of a model, and whether it can: nothing is changed here."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lq_plugin.auto_format import Auto, Chooser
from lq_plugin.formats import Format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.gemm import GemmFormats
from lq_plugin.layers.experts import FrozenExperts, projections, unknown_experts
from lq_plugin.layers.frozen import FrozenWeight
from lq_plugin.layers.linear import QuantConv1D, QuantLinear, is_conv1d
from lq_plugin.policy import NO_PATTERN, Policy
from lq_plugin.structure import (
    embedding_parameters,
    impossible,
    is_embedding,
    is_lazy,
    is_linear,
    named_modules,
    quantized_elsewhere,
    unwanted,
)

_EMBEDDING = "embedding"
# What the quantisation ops take.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Below this share of the weights a conversion is more likely a mistake in the patterns than a wish.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Layer:
    """What became of a linear, an embedding or one projection of fused experts.

    formats: its format, or None, and then `reason` says why it was left alone. projection: of experts, its name.
    is_auto: "auto" chose that by the shape, and `reason` says why in either case.
    """

    name: str
    module: nn.Module = field(repr=False)
    formats: Format | None
    reason: str
    projection: str = ""
    is_auto: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        if not self.projection:
            return list(self.module.parameters(recurse=False))
        bias = self.module._parameters.get(f"{self.projection}_bias")
        weight = self.frozen
        weights = [self.module.get_parameter(self.projection)] if weight is None else list(weight.parameters())
        return [*weights, bias] if bias is not None else weights

    @property
    def frozen(self) -> FrozenWeight | None:
        """The module that keeps the weight as codes, if one does."""
        if isinstance(self.module, FrozenExperts):
            return self.module.frozen_weight(self.projection)
        return self.module if isinstance(self.module, FrozenWeight) and self.module.is_frozen else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as it was before it became codes."""
        frozen = self.frozen
        return tuple(self.weight.shape if frozen is None else frozen.rows.shape)

    @property
    def weight(self) -> Tensor:
        """Of the module itself; of one that is reparametrised it is computed."""
        weight: Tensor = getattr(self.module, self.projection or "weight")
        return weight

    @property
    def elements(self) -> int:
        """Of its matrices (parameters of two or more dimensions), as they were before they became codes."""
        codes = self._code_ids
        matrices = sum(p.numel() for p in self.parameters if p.dim() >= 2 and id(p) not in codes)
        return matrices + (torch.Size(self.shape).numel() if codes else 0)

    @property
    def bytes_before(self) -> int:
        codes = self._code_ids
        rest = sum(p.numel() * p.element_size() for p in self.parameters if id(p) not in codes)
        frozen = self.frozen
        return rest if frozen is None else rest + torch.Size(self.shape).numel() * frozen.weight_dtype.itemsize

    @property
    def bytes_after(self) -> int:
        buffers = [] if self.frozen is None else list(self.frozen.buffers(recurse=False))
        return sum(t.numel() * t.element_size() for t in (*self.parameters, *buffers))

    @property
    def _code_ids(self) -> set[int]:
        return set() if self.frozen is None else {id(getattr(self.frozen, name)) for name in self.frozen.codes}


@dataclass(frozen=True)
class Conversion:
    """layers: every linear, embedding and projection of experts. rest: the parameters outside them.

    embeddings: ids of parameters. adapted: names of the layers that have LoRA. adapters: the parameters of that.
    notes: how "auto" chose.
    """

    layers: list[Layer]
    rest: list[nn.Parameter] = field(repr=False)
    embeddings: set[int] = field(repr=False)
    adapted: tuple[str, ...] = ()
    adapters: list[nn.Parameter] = field(repr=False, default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.formats]

    @property
    def weights(self) -> int:
        """Elements of all matrices (parameters of two or more dimensions) outside the embeddings and the adapters."""
        rest = {id(p): p.numel() for p in self.rest if p.dim() >= 2 and id(p) not in self.embeddings}
        return self._elements(self.layers) + sum(rest.values())

    @property
    def quantized_weights(self) -> int:
        return self._elements(self.converted)

    @property
    def decided_share(self) -> float:
        """Of the weights that are quantised, or were left alone by "auto" to be faster."""
        decided = self._elements(layer for layer in self.layers if layer.formats or layer.is_auto)
        return decided / self.weights if self.weights else 0.0

    @property
    def share(self) -> float:
        return self.quantized_weights / self.weights if self.weights else 0.0

    def _elements(self, layers: Iterable[Layer]) -> int:
        """Each weight once, though several layers hold it."""
        elements = {}
        for layer in layers:
            keys = [id(p) for p in layer.parameters]
            if not any(key in self.embeddings for key in keys):
                elements[keys[0] if keys else id(layer)] = layer.elements
        return sum(elements.values())

    def __str__(self) -> str:
        from lq_plugin.report import conversion_table

        return conversion_table(self)


def planned(model: nn.Module, policy: Policy) -> Conversion:
    """What the policy will make of the model; ValueError for what cannot be."""
    for name, module in named_modules(model):
        if is_lazy(module):
            raise ValueError(f"layer {name!r} has no shape yet: run one batch through the model before converting it")
    conversion = conversion_of(model, policy)
    policy.check_patterns(layer.name for layer in conversion.layers if layer.reason != _EMBEDDING)
    for layer in conversion.layers:
        if layer.reason != _EMBEDDING and policy.decide(layer.name)[0] is not None:
            _check_weight(layer, policy)
    _check_experts(conversion)
    return conversion


def conversion_of(model: nn.Module, policy: Policy) -> Conversion:
    """What the policy would make of the model."""
    layers, adapters = list(_plan(model, policy)), _adapters(model)
    adapted = tuple(name for name, _ in adapters)
    beside = {id(p): p for _, parameters in adapters for p in parameters}
    seen = {id(p) for layer in layers for p in layer.parameters} | beside.keys()
    rest = [p for p in model.parameters() if id(p) not in seen]
    return Conversion(layers, rest, embedding_parameters(model), adapted, list(beside.values()), policy.notes)


def _adapters(model: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """The name of each layer that has LoRA, ours or PEFT's, and what lies beside its base_layer."""
    found = []
    for name, module in named_modules(model):
        base = module._modules.get("base_layer")
        if base is not None:
            inside = {id(p) for p in base.parameters()}
            found.append((name, [p for p in module.parameters() if id(p) not in inside]))
    return found


def _plan(model: nn.Module, policy: Policy) -> Iterator[Layer]:
    cannot, should_not = impossible(model), unwanted(model)
    for name, module in named_modules(model):
        if is_embedding(module):
            yield Layer(name, module, None, _EMBEDDING)
        for projection in module.names if isinstance(module, FrozenExperts) else projections(module):
            full = f"{name}.{projection}" if name else projection
            yield _decided(Layer(full, module, None, "", projection), policy, cannot, {})
        for weight in unknown_experts(module):
            yield Layer(f"{name}.{weight}".lstrip("."), module, None, "fused experts whose forward is unknown", weight)
        if is_linear(module):
            yield _decided(Layer(name, module, None, ""), policy, cannot, should_not)


def _decided(layer: Layer, policy: Policy, cannot: Mapping[int, str], should_not: Mapping[int, str]) -> Layer:
    """The layer with its format and reason."""
    module, name = layer.module, layer.name
    wanted, reason = policy.decide(name)
    assert not isinstance(wanted, Auto), "Policy.on comes first"
    formats = None if isinstance(wanted, Chooser) else wanted
    frozen = layer.frozen
    if frozen is not None and (formats is None or id(module) in {*cannot, *should_not}):
        formats, reason = frozen.format, ""
    elif id(module) in cannot:
        formats, reason = None, cannot[id(module)]
    elif id(module) in should_not and not policy.names_in_full(name):
        formats, reason = None, should_not[id(module)]
    elif isinstance(wanted, Chooser):
        return _chosen(layer, wanted)
    elif formats is None and isinstance(module, QuantLinear | QuantConv1D) and not _goes_back(module, reason):
        formats, reason = module.formats, ""
    elif isinstance(formats, FrozenFormat) and frozen is None and 0 in layer.shape:
        formats, reason = None, "it has no elements"
    elif layer.projection and isinstance(formats, GemmFormats):
        reason = f"fused experts: {formats.name} trains linear layers only"
        formats = None
    return Layer(name, module, formats, reason, layer.projection)


def _chosen(layer: Layer, chooser: Chooser) -> Layer:
    """The layer with what "auto" makes of its shape; one that its user built in a format stays what it is."""
    if layer.projection:
        return replace(layer, reason="auto: fused experts train in 16 bits")
    choice = chooser.choose(*(layer.shape if is_conv1d(layer.module) else reversed(layer.shape)))
    module = layer.module
    if choice.formats is None and isinstance(module, QuantLinear | QuantConv1D) and not _goes_back(module, ""):
        return replace(layer, formats=module.formats)
    return replace(layer, formats=choice.formats, reason=choice.reason, is_auto=True)


def _goes_back(module: nn.Module, reason: str) -> bool:
    """Whether a layer that convert() changed is to be left alone now; one that its user built stays what it is."""
    return "converted_from" in module.__dict__ and reason != NO_PATTERN


def _check_weight(layer: Layer, policy: Policy) -> None:
    wanted, module = policy.decide(layer.name)[0], layer.module
    if layer.frozen is not None and not isinstance(wanted, Chooser) and wanted not in (None, layer.frozen.format):
        raise ValueError(
            f"layer {layer.name!r} is frozen in {layer.frozen.format} and cannot become "
            f"{getattr(wanted, 'name', wanted)}: its float weights are gone; convert the model that it was made from"
        )
    freezes = isinstance(layer.formats, FrozenFormat) and layer.frozen is None
    if freezes and "forward" in vars(module):
        raise ValueError(
            f"the forward of layer {layer.name!r} was replaced, as accelerate does to spread a model over devices: "
            "convert the model before it is dispatched, or leave the layer out by `skip`"
        )
    foreign = None if layer.projection else quantized_elsewhere(module)
    if foreign is not None:
        raise ValueError(
            f"layer {layer.name!r} is quantised already ({foreign}): load the model without a quantization config, or "
            "leave the layer out by `skip`"
        )
    if freezes and layer.weight.dtype not in _DTYPES:
        raise ValueError(
            f"layer {layer.name!r} has a weight of {layer.weight.dtype}, and {wanted.name} is made from "  # type: ignore[union-attr]
            f"{', '.join(map(str, _DTYPES))}: cast the layer first, or leave it out by `skip`"
        )


def _check_experts(conversion: Conversion) -> None:
    wanted: dict[int, set[Format | None]] = defaultdict(set)
    for layer in conversion.layers:
        if layer.projection:
            wanted[id(layer.module)].add(layer.formats)
    for layer in conversion.layers:
        if len(wanted[id(layer.module)]) > 1:
            raise ValueError(
                f"the projections of the experts of {layer.name!r} are one module: give all of them the same format"
            )


def check_share(conversion: Conversion, partial: bool) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in conversion.layers:
        if layer.formats is None:
            reasons[layer.reason].append(layer.name)
    left = "; ".join(f"{reason}: {', '.join(names[:3])}{' …' * (len(names) > 3)}" for reason, names in reasons.items())
    if not any(layer.formats or layer.is_auto for layer in conversion.layers):
        found = f"left alone: {left}" if left else "the model has no nn.Linear"
        raise ValueError(f"no linear layer to convert ({found}); pass linear=None to quantise none")
    if conversion.decided_share < _LEAST_SHARE and not partial:
        raise ValueError(
            f"only {conversion.share:.1%} of the weights outside the embeddings would be quantised, less than half "
            f"(left alone: {left or 'none'}); pass partial=True to accept that"
        )
