"""Gives the linear layers of a model a format, in place, and says what became of each layer.

A trainable format keeps the parameter: a layer is converted by changing its class, so that parameters, hooks, names
and ties stay what they were.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from lq_plugin.formats.gemm import GemmFormats
from lq_plugin.layers.linear import QuantConv1D, QuantLinear
from lq_plugin.policy import NO_PATTERN, LinearSpec, Policy
from lq_plugin.structure import (
    disable_fast_paths,
    embedding_parameters,
    impossible,
    is_conv1d,
    is_embedding,
    is_lazy,
    is_linear,
    named_modules,
    unwanted,
)

# Below this share of the weights a conversion is more likely a mistake in the patterns than a wish.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Layer:
    """What became of a linear or an embedding: its format, or the reason why it was left alone."""

    name: str
    module: nn.Module = field(repr=False)
    formats: GemmFormats | None
    reason: str

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters(recurse=False))


@dataclass(frozen=True)
class Conversion:
    """layers: every linear and embedding. rest: the parameters outside them. embeddings: ids of parameters."""

    layers: list[Layer]
    rest: list[nn.Parameter] = field(repr=False)
    embeddings: set[int] = field(repr=False)

    @property
    def converted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.formats]

    @property
    def weights(self) -> int:
        """Elements of all matrices (parameters of two or more dimensions) outside the embeddings."""
        return self._matrix_elements(
            p for parameters in (*(x.parameters for x in self.layers), self.rest) for p in parameters
        )

    @property
    def quantized_weights(self) -> int:
        return self._matrix_elements(p for layer in self.converted for p in layer.parameters)

    @property
    def share(self) -> float:
        return self.quantized_weights / self.weights if self.weights else 0.0

    def _matrix_elements(self, parameters: Iterable[nn.Parameter]) -> int:
        matrices = {id(p): p.numel() for p in parameters if p.dim() >= 2}
        return sum(numel for key, numel in matrices.items() if key not in self.embeddings)

    def __str__(self) -> str:
        from lq_plugin.report import conversion_table

        return conversion_table(self)


def convert(
    model: nn.Module,
    linear: LinearSpec = "int8_switchback",
    *,
    skip: Iterable[str] = (),
    lora: object | None = None,
    partial: bool = False,
) -> Conversion:
    """Converts the linear layers of a model in place; printing what it returns shows a table.

    linear: a format name or object, or {name pattern: format}, where the first match wins; None converts nothing.
    skip: patterns of layers to leave alone, on top of those that always are: tied weights, the output embedding,
    routers and the projections inside MultiheadAttention. A layer that an earlier call converted goes back to 16 bits
    where it is skipped or its format is None. partial: accept that less than half of the weights convert.

    Nothing is changed when it raises. ValueError: an unknown format; a pattern that matches no layer; nothing to
    convert; less than half of the weights outside the embeddings converted.
    """
    if lora is not None:
        raise ValueError("lora needs a frozen base format, which this version does not have; leave lora=None")
    for name, module in named_modules(model):
        if is_lazy(module):
            raise ValueError(f"layer {name!r} has no shape yet: run one batch through the model before converting it")
    policy = Policy.of(linear, skip)
    policy.check_patterns(name for name, module in named_modules(model) if is_linear(module))
    conversion = _conversion(model, policy)
    if policy.converts:
        _check_share(conversion, partial)
    for layer in conversion.layers:
        _give(layer.module, layer.formats)
    if conversion.converted:
        disable_fast_paths(model)
    return conversion


def report_of(model: nn.Module) -> Conversion:
    """What became of a model's layers earlier; nothing is changed."""
    return _conversion(model, Policy.of({}, ()))


def _conversion(model: nn.Module, policy: Policy) -> Conversion:
    """What the policy would make of the model."""
    layers = list(_plan(model, policy))
    seen = {id(p) for layer in layers for p in layer.parameters}
    rest = [p for p in model.parameters() if id(p) not in seen]
    return Conversion(layers, rest, embedding_parameters(model))


def _give(module: nn.Module, formats: GemmFormats | None) -> None:
    """Changes the class of a layer to one with a format, or back to the one that it had."""
    if formats is not None:
        if not isinstance(module, QuantLinear | QuantConv1D):
            module.converted_from = type(module)  # type: ignore[assignment]
            module.__class__ = QuantConv1D if is_conv1d(module) else QuantLinear
        module.formats = formats  # type: ignore[assignment]
    elif "converted_from" in module.__dict__:
        module.__class__ = module.__dict__.pop("converted_from")
        del module.formats


def _goes_back(module: nn.Module, reason: str) -> bool:
    """Whether a layer that convert() changed is to be left alone now; one that its user built stays what it is."""
    return "converted_from" in module.__dict__ and reason != NO_PATTERN


def _plan(model: nn.Module, policy: Policy) -> Iterator[Layer]:
    cannot, should_not = impossible(model), unwanted(model)
    for name, module in named_modules(model):
        if is_embedding(module):
            yield Layer(name, module, None, "embedding")
        if not is_linear(module):
            continue
        formats, reason = policy.decide(name)
        if id(module) in cannot:
            formats, reason = None, cannot[id(module)]
        elif id(module) in should_not and not policy.names_in_full(name):
            formats, reason = None, should_not[id(module)]
        elif formats is None and isinstance(module, QuantLinear | QuantConv1D) and not _goes_back(module, reason):
            formats, reason = module.formats, ""
        yield Layer(name, module, formats, reason)


def _check_share(conversion: Conversion, partial: bool) -> None:
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in conversion.layers:
        if layer.formats is None:
            reasons[layer.reason].append(layer.name)
    left = "; ".join(f"{reason}: {', '.join(names[:3])}{' …' * (len(names) > 3)}" for reason, names in reasons.items())
    if not conversion.converted:
        found = f"left alone: {left}" if left else "the model has no nn.Linear"
        raise ValueError(f"no linear layer to convert ({found}); pass linear=None to quantise none")
    if conversion.share < _LEAST_SHARE and not partial:
        raise ValueError(
            f"only {conversion.share:.1%} of the weights outside the embeddings would be quantised, less than half "
            f"(left alone: {left or 'none'}); pass partial=True to accept that"
        )
