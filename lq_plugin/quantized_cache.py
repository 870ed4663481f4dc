"""A quantised model on disk, for the next load of the same files in the same format.

A folder of the cache is named by what made it: a change of files, format, dtype or version is another folder. It holds
model.safetensors (all that is not quantised), frozen-*.safetensors (the entries of each frozen layer's state_dict)
and complete.json, which lists them with their sizes. It appears whole or not at all.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

import lq_plugin
from lq_plugin.frozen_tensors import frozen_layers
from lq_plugin.new_folder import new_folder
from lq_plugin.safetensors_files import TensorFiles
from lq_plugin.safetensors_shards import ShardWriter

if TYPE_CHECKING:
    from lq_plugin.freezing_quantizer import Freezing
    from lq_plugin.pretrained_source import PretrainedSource

_MANIFEST = "complete.json"
_FROZEN = "frozen"
_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedCache:
    folder: Path
    source: "PretrainedSource"

    @classmethod
    def of(cls, cache: str | Path, source: "PretrainedSource", request: str) -> "QuantizedCache":
        """request: what was asked for, as text that is equal for equal requests."""
        parts = [
            f"cache {_VERSION}, lq_plugin {lq_plugin.__version__}",
            source.files.fingerprint(),
            source.model_class.__name__,
            source.config.to_json_string(),
            f"{source.dtype}",
            request,
        ]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return cls(Path(cache) / key, source)

    def load(self, freezing: "Callable[[TensorFiles], Freezing]") -> nn.Module | None:
        """The model, or None where there is none yet, or one that cannot be read, which is removed."""
        if not self.folder.exists():
            return None
        try:
            self._check_sizes()
            stored = TensorFiles.of(self.folder.glob(f"{_FROZEN}*.safetensors"))
            return self.source.at(self.folder).load(freezing(stored))
        except (ValueError, OSError) as error:
            _log.warning("The quantised model in %s cannot be read and is made again: %s", self.folder, error)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None

    def fill(self, model: nn.Module) -> nn.Module:
        """Writes `model` and returns it, also where it cannot be written, which a warning says.

        A process that was faster is left its folder.
        """
        try:
            with new_folder(self.folder) as folder:
                _write(model, folder)
        except (OSError, SafetensorError) as error:
            if self.folder.is_dir():
                _log.info("%s was filled by another process meanwhile", self.folder)
            else:
                _log.warning(
                    "The quantised model could not be kept in %s, the next load quantises again: %s", self.folder, error
                )
        return model

    def _check_sizes(self) -> None:
        """ValueError or OSError unless all files are there in their full lengths."""
        sizes = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(sizes, dict) or not sizes:
            raise ValueError(f"{_MANIFEST} lists no files")
        for name, size in sizes.items():
            if (found := (self.folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes of {size}")


def _write(model: Any, folder: Path) -> None:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    layers = frozen_layers(model)
    rest, frozen = ShardWriter(folder), ShardWriter(folder, _FROZEN)
    plain = model.state_dict()
    for name, layer in layers.items():
        for key in layer.state_dict(prefix=f"{name}."):
            frozen.add(key, plain.pop(key))
    for key, tensor in remove_tied_weights_from_state_dict(plain, model).items():
        rest.add(key, tensor)
    rest.finish()
    frozen.finish()
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
