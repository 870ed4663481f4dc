"""What frozen linear layers have in common: an nn.Linear that keeps its weight as codes and never trains it.

In memory a layer holds integers only, beside its bias: codes in `weight`, the float32 bits of its scales as int32.
`.half()`, `.to(dtype)` and whoever else casts floating tensors (FSDP2, Lightning) leave them alone. Its state_dict is
that of bitsandbytes' layer of the same name; a plain float weight loads too, and is quantised.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.layers.linear import is_conv1d

_Frozen = TypeVar("_Frozen", bound="FrozenLinear")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_KINDS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")


def output_dtype(x: Tensor) -> torch.dtype:
    """What nn.Linear returns for x: the autocast dtype inside autocast, else the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Rows(Protocol):
    """How a float tensor of `shape` is kept as integer tensors, and its form in checkpoints."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def codes(self) -> tuple[str, ...]:
        """Names of the tensors: those of two dimensions are parameters, which shard by row, the others buffers."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]: ...

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor: ...

    def select(self, tensors: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
        """`dequantize(...)[index]` for an index (n,) of the first dimension, reading no more than that."""

    def entries(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What a state_dict holds."""

    def is_entry(self, name: str) -> bool: ...

    def absent(self, entries: Mapping[str, Tensor]) -> list[str]:
        """Names that `entries`, which have a weight of codes, still need."""

    def superfluous(self, entries: Mapping[str, Tensor]) -> list[str]:
        """Names in `entries` that these rows never have."""

    def read(self, entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.dtype | None]:
        """`entries`, checked -> the tensors and the dtype that was quantised; ValueError tells what is wrong."""


class FrozenWeight(nn.Module):
    """A module that keeps its weight as `rows` says, in integer parameters and buffers.

    transposed: checkpoints hold the float weight with its last two dimensions swapped, as Conv1D does.
    """

    format: FrozenFormat
    rows: Rows
    weight: nn.Parameter
    transposed = False

    @property
    def codes(self) -> tuple[str, ...]:
        return self.rows.codes

    @property
    def is_frozen(self) -> bool:
        """False for a layer of LLM.int8() whose weight trains."""
        return True

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the weight was quantised from."""
        return self._weight_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`; None is the dtype that it was quantised from."""
        return self.rows.dequantize(self.code_tensors(), dtype or self.weight_dtype)

    def code_tensors(self) -> dict[str, Tensor]:
        """name -> parameter or buffer, for each of `codes`."""
        held = self._parameters | self._buffers
        return {name: held[name] for name in self.codes}  # type: ignore[misc]

    @torch.no_grad()
    def requantize(self, weight: Tensor) -> None:
        """Quantises a float weight into this module, in place, on the device of the module.

        A module on the meta device goes to the device of the weight. ValueError: another shape, or no float.
        """
        if tuple(weight.shape) != tuple(self.rows.shape) or not weight.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes a float weight {tuple(self.rows.shape)}, got {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        held = self._parameters.get("weight")
        if held is not None and not held.is_meta:
            weight = weight.to(held.device)
        self.store(self.rows.quantize(weight), weight.dtype)

    def store(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, assign: bool = False) -> None:
        """Takes over what `rows` quantised or read; assign=True takes the tensors themselves."""
        self._weight_dtype = dtype
        for name in self.codes:
            held, tensor = getattr(self, name, None), tensors[name].detach()
            if held is not None and not assign and not held.is_meta:
                held.data.copy_(tensor)
            elif tensor.ndim == 2:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def requires_grad_(self, requires_grad: bool = True) -> "FrozenWeight":
        """RuntimeError for True: codes have no gradient."""
        if requires_grad and self.is_frozen:
            raise RuntimeError(
                f"the weight of a {type(self).__name__} is kept as {self.format.name} codes and cannot train: train an "
                "adapter beside it (lora=LoRAConfig(...)), or its bias alone, layer.bias.requires_grad_(True)"
            )
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenWeight":
        return super()._apply(lambda tensor: _same_integers(tensor, fn(tensor)), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        plain: dict[str, Any] = {}
        super()._save_to_state_dict(plain, prefix, keep_vars)
        for name in self.codes:
            plain.pop(f"{prefix}{name}", None)
        tensors = {name: tensor.detach() for name, tensor in self.code_tensors().items()}
        entries = self.rows.entries(tensors, self.weight_dtype)
        destination.update({f"{prefix}{name}": tensor for name, tensor in entries.items()} | plain)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Checks all entries of the weight before it touches any: what cannot be read changes nothing."""
        mine = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        names = {name for name in mine if self.rows.is_entry(name)}
        strays = [name for name in self.codes if name in mine - names]
        others = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in {*names, *strays}}
        missing: list[str] = []
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in self.codes]
        entries = {name: state_dict[f"{prefix}{name}"] for name in sorted(names)}
        plain = set(entries) == {"weight"} and entries["weight"].is_floating_point()
        absent = ["weight"] if "weight" not in entries else [] if plain else self.rows.absent(entries)
        superfluous = [] if plain else self.rows.superfluous(entries)
        missing_keys += [f"{prefix}{name}" for name in absent if strict]
        unexpected_keys += [f"{prefix}{name}" for name in (*superfluous, *strays) if strict]
        if absent or superfluous:
            if "weight" in entries:
                fault = f"without {', '.join(absent)}" if absent else f"with {', '.join(superfluous)}"
                error_msgs.append(f"{prefix}weight {fault} is no weight of {type(self).__name__}: it stays as it was")
            return
        try:
            self._take(entries, plain, bool(local_metadata.get("assign_to_params_buffers", False)))
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    @torch.no_grad()
    def _take(self, entries: Mapping[str, Tensor], plain: bool, assign: bool) -> None:
        if self.weight.is_meta and not assign:
            raise ValueError("the layer is on the meta device: load with assign=True, or call to_empty first")
        weight = entries["weight"]
        if weight.is_meta:
            raise ValueError("the file's tensor is on the meta device, where it has no values")
        if plain:
            self.requantize(weight.transpose(-2, -1) if self.transposed and weight.ndim > 1 else weight)
            return
        tensors, dtype = self.rows.read(entries)
        self.store(tensors, dtype or self.weight_dtype, assign)


class FrozenLinear(FrozenWeight, nn.Linear):  # type: ignore[misc]  # `weight` is a parameter there too
    """x (..., I) -> (..., O) with a weight (O, I) that is quantised and frozen.

    weight: an integer parameter, the codes. bias: a parameter or None.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.requantize(torch.empty(out_features, in_features, device="meta", dtype=dtype))
        bias_parameter = nn.Parameter(torch.empty(out_features, device="meta", dtype=dtype)) if bias else None
        self.register_parameter("bias", bias_parameter)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @property
    def W_q(self) -> nn.Parameter:
        """The codes, under the name by which PEFT tells layers whose weight it must ask `dequantize` for."""
        return self.weight

    @classmethod
    def frozen_from(
        cls: type[_Frozen], linear: nn.Module, format: FrozenFormat, device: torch.device | str | None = None
    ) -> _Frozen:
        """See `FrozenFormat.freeze`."""
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise ValueError(
                f"a {type(linear).__name__} with a weight of {weight.dtype} is quantised already: dequantise it first"
            )
        weight = weight.detach().t() if is_conv1d(linear) else weight.detach()
        layer = cls.with_format(format, weight.shape[1], weight.shape[0])
        layer.requantize(weight if device is None else weight.to(device))
        if isinstance(bias, nn.Parameter) and device is not None and bias.device != torch.device(device):
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        layer.register_parameter("bias", bias)  # type: ignore[arg-type]
        layer.transposed = is_conv1d(linear)
        layer.training = linear.training
        for name in (*_HOOKS, *_HOOK_KINDS):
            getattr(layer, name).update(getattr(linear, name))
        return layer

    @classmethod
    def with_format(cls: type[_Frozen], format: FrozenFormat, in_features: int, out_features: int) -> _Frozen:
        """A layer on the meta device, without a bias."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """A new random weight and bias, those of nn.Linear."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        shape, held = (self.out_features, self.in_features), self.weight
        if held.is_meta:
            return
        self.requantize(torch.empty(shape, device=held.device, dtype=self.weight_dtype).uniform_(-bound, bound))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def check_input(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{type(self).__name__} takes (..., {self.in_features}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} takes floats, got {x.dtype}. A model that casts its input to the dtype of a "
                "weight, as T5 does before `wo`, does not work with codes there: pass skip= with that layer to convert"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


def _same_integers(before: Tensor, after: Tensor) -> Tensor:
    """`after`, or where a cast made numbers of codes, the codes on its device."""
    if before.is_floating_point() or before.dtype == after.dtype:
        return after
    return before.to(after.device)
