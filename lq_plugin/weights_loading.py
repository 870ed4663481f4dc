"""The files of any nn.Module, read into one on the meta device; its linears are quantised as they come."""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lq_plugin.conversion import frozen_plan
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.frozen_tensors import frozen_weights, restored, take_place
from lq_plugin.layer_progress import LayerProgress
from lq_plugin.policy import LinearSpec
from lq_plugin.safetensors_files import FEW, TensorFiles, TensorReader, few
from lq_plugin.structure import disable_fast_paths
from lq_plugin.transformers_models import tell_transformers


def load_weights(
    model: nn.Module,
    files: str | Path | Iterable[str | Path],
    linear: LinearSpec = "nf4",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    skip: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Gives `model` the tensors of `files` on `device`, its linears frozen in `linear`, in place, and returns it.

    model: built on the meta device: `with torch.device("meta"): model = Model()`, or with parameters only there, as
    accelerate's init_empty_weights(include_buffers=False) does. What it has elsewhere is replaced too.
    files: a folder, a .safetensors file or several; their names are those of the model's state_dict. Layers may be
    there in the entries of a frozen layer of that format. linear, skip: as for `convert`; None quantises nothing.
    dtype: of floating parameters; None is that of the model's own. Ties stay ties: a name of each is enough.

    The model is changed when everything is read, and not at all where something is wrong. FileNotFoundError: see
    `TensorFiles.of`. ValueError: names that are missing or unknown, shapes that differ, a damaged file, a tensor in
    another format than `linear`, buffers on the meta device that no file holds.
    """
    found = TensorFiles.of(files)
    plan = layers_to_freeze(model, linear, skip)
    places = _Places.of(model, plan)
    _check(model, places, found)
    loading = _Loading(places, target_device(device), dtype)
    with LayerProgress(f"Loading {type(model).__name__}", progress) as bar, found.reader() as reader:
        bar.expect(len(plan) or None)
        for name, format in plan.items():
            loading.read_layer(name, format, reader)
            bar.advance()
        for name in places.plain:
            loading.read_plain(name, reader)
    loading.commit(model)
    disable_fast_paths(model)
    tell_transformers(model)
    return model


@dataclass(frozen=True)
class _Places:
    """What the files have to hold. layers: of the plan. plain: all other parameters and persistent buffers, by name.

    aliases: all names of the layers, of which one that stands twice in the model has several. owners: id of a tensor ->
    the names that share it.
    """

    layers: dict[str, nn.Module]
    aliases: set[str]
    plain: dict[str, Tensor]
    owners: dict[int, list[str]]

    @classmethod
    def of(cls, model: nn.Module, plan: dict[str, FrozenFormat]) -> "_Places":
        layers = {name: model.get_submodule(name) for name in plan}
        planned = {id(module) for module in layers.values()}
        aliases: set[str] = set()
        plain: dict[str, Tensor] = {}
        owners: dict[int, list[str]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            if id(module) in planned:
                aliases.add(prefix)
                continue
            buffers = {k: x for k, x in module._buffers.items() if k not in module._non_persistent_buffers_set}
            for key, tensor in {**module._parameters, **buffers}.items():
                if tensor is not None:
                    name = f"{_prefix(prefix)}{key}"
                    plain[name] = tensor
                    owners.setdefault(id(tensor), []).append(name)
        return cls(layers, aliases, plain, owners)

    def ties(self, name: str) -> list[str]:
        return self.owners[id(self.plain[name])]

    def layer_of(self, name: str) -> str | None:
        """The planned layer whose entries a name in a file belongs to."""
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts)))
        return next((prefix for prefix in prefixes if prefix in self.aliases), None)


class _Loading:
    """New layers and tensors, kept beside the model until all of them are read."""

    def __init__(self, places: _Places, device: torch.device, dtype: torch.dtype | None) -> None:
        self._places, self._device, self._dtype = places, device, dtype
        self._layers: dict[str, nn.Module] = {}
        self._tensors: dict[str, Tensor] = {}

    def read_layer(self, name: str, format: FrozenFormat, reader: TensorReader) -> None:
        module, prefix = self._places.layers[name], _prefix(name)
        names = [key for key in reader.names if key.startswith(prefix) and key not in self._places.plain]
        entries = {key.removeprefix(prefix): reader.read(key, self._device) for key in names}
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        if entries.keys() != own.keys() or not all(entries[x].is_floating_point() for x in frozen_weights(module)):
            self._layers[name] = restored(name, module, format, entries, self._device)
            return
        read = copy.copy(module)
        read._parameters = dict(module._parameters)
        for key, before in own.items():
            if entries[key].shape != before.shape:
                raise ValueError(
                    f"{prefix}{key} has shape {tuple(entries[key].shape)}, the model has {tuple(before.shape)}"
                )
            value = nn.Parameter(self._value(before, entries.pop(key)), requires_grad=before.requires_grad)
            read._parameters[key] = value
        self._layers[name] = format.freeze(read)

    def read_plain(self, name: str, reader: TensorReader) -> None:
        present = [tie for tie in self._places.ties(name) if tie in reader.names]
        if name != present[0]:
            return
        before = self._places.plain[name]
        value = self._value(before, reader.read(name, self._device))
        for other in present[1:]:
            if not torch.equal(value, self._value(before, reader.read(other, self._device))):
                raise ValueError(f"{name} and {other} are one tensor of the model, and the files give them two values")
        if isinstance(before, nn.Parameter):
            value = nn.Parameter(value, requires_grad=before.requires_grad)
        for tie in self._places.ties(name):
            self._tensors[tie] = value

    def _value(self, before: Tensor, value: Tensor) -> Tensor:
        casts = isinstance(before, nn.Parameter) and before.is_floating_point()
        return value.to(self._dtype if casts and self._dtype is not None else before.dtype)

    def commit(self, model: nn.Module) -> None:
        for name, layer in self._layers.items():
            take_place(self._places.layers[name], layer)
        for name, value in self._tensors.items():
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, value)


def _check(model: nn.Module, places: _Places, found: TensorFiles) -> None:
    wrong = []
    held = found.tensors.keys()
    missing = [name for name in places.plain if not held & set(places.ties(name))]
    missing += [name for layer, module in places.layers.items() for name in _lacking(layer, module, held)]
    if missing:
        wrong.append(f"they lack {few(missing)}")
    if unknown := [name for name in held if name not in places.plain and places.layer_of(name) is None]:
        wrong.append(f"they hold {few(unknown)}, which the model does not have")
    for name, expected in places.plain.items():
        if name in held and found.tensors[name].shape != tuple(expected.shape):
            wrong.append(f"{name} has shape {found.tensors[name].shape}, the model has {tuple(expected.shape)}")
    if wrong:
        raise ValueError(f"the files do not fit {type(model).__name__}: {'; '.join(wrong[:FEW])}")
    blank = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in places.plain]
    if blank := [name for name in blank if places.layer_of(name) is None]:
        raise ValueError(
            f"the buffers {few(blank)} are on the meta device and are not saved, so that nothing has their values: "
            "build the model with parameters only on the meta device, with accelerate's "
            "init_empty_weights(include_buffers=False)"
        )


def _lacking(layer: str, module: nn.Module, held: Collection[str]) -> list[str]:
    """What a planned layer lacks: its weights, in whichever form, and what is never quantised, as a bias."""
    weights = frozen_weights(module)
    names = [name for name, _ in module.named_parameters(recurse=False)]
    prefix = _prefix(layer)
    absent = [x for x in names if x not in weights and f"{prefix}{x}" not in held]
    absent += [x for x in weights if not any(k == f"{prefix}{x}" or k.startswith(f"{prefix}{x}.") for k in held)]
    return [f"{prefix}{x}" for x in absent]


def _prefix(name: str) -> str:
    """Of what a module holds; the model itself has no name."""
    return f"{name}." if name else ""


def target_device(device: torch.device | str | None) -> torch.device:
    """None: the GPU if there is one."""
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def layers_to_freeze(model: nn.Module, linear: LinearSpec, skip: Iterable[str]) -> dict[str, FrozenFormat]:
    """As `frozen_plan`; ValueError where it is empty, though something was asked for."""
    plan = {} if linear is None else frozen_plan(model, linear, skip)
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # transformers ties after loading
    shared = {*tied, *tied.values()}
    plan = {name: format for name, format in plan.items() if f"{name}.weight" not in shared}
    if not plan and linear is not None:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to freeze: pass linear=None to load it as it is, or look at "
            "skip="
        )
    return plan
