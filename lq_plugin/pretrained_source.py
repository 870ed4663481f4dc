"""A transformers model in files: its class, config and tensors, and how transformers is asked to load it.

This module imports transformers; nothing imports it before a model is loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from lq_plugin.freezing_quantizer import Freezing, FreezingConfig, LayerError
from lq_plugin.model_folder import model_folder
from lq_plugin.safetensors_files import FEW, TensorFiles, few


@dataclass(frozen=True)
class PretrainedSource:
    """name: as the user wrote it. quantization_config: of a checkpoint that is quantised already, else None."""

    name: str
    folder: Path
    files: TensorFiles
    model_class: type[transformers.PreTrainedModel]
    config: transformers.PretrainedConfig
    quantization_config: Mapping[str, Any] | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, source: str | Path, dtype: torch.dtype | None) -> "PretrainedSource":
        """Everything but the tensors is read and checked; see `load_pretrained` for what is raised."""
        folder = model_folder(source)
        config = _config(folder)
        model_class = _model_class(config, folder)
        files = TensorFiles.of(folder)
        if getattr(config, "transformers_weights", None):
            config.transformers_weights = None  # a path of another file, which was not looked at
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None:
            del config.quantization_config
            quantized = quantized if isinstance(quantized, Mapping) else quantized.to_dict()
        elif frozen := next((name for name in files.tensors if _is_frozen_entry(name)), None):
            raise ValueError(
                f"{folder} holds frozen layers ({frozen}), of which its config.json says nothing, as save_pretrained "
                "of a converted model leaves it: read it with lq_plugin.load_weights into a model built from the "
                "config, or with load_state_dict into one that was converted and adapted alike. save_quantized and "
                "save_adapter write folders that load"
            )
        return cls(str(source), folder, files, model_class, config, quantized, dtype)

    def at(self, folder: Path) -> "PretrainedSource":
        """The same model with other files, those of `folder`."""
        return replace(self, folder=folder, files=TensorFiles.of(folder))

    def load(self, freezing: Freezing) -> nn.Module:
        """The model in eval mode, with the layers of `freezing` frozen."""
        with quiet(), _layer_errors():
            loaded: Any = self.model_class.from_pretrained(
                self.folder,
                config=self.config,
                dtype=self.dtype or "auto",
                device_map={"": freezing.device},
                quantization_config=FreezingConfig(freezing),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, and are told below
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        model, info = loaded
        self._check(info)
        model.config._name_or_path = model.name_or_path = self.name
        return model

    def _check(self, info: Mapping[str, Any]) -> None:
        wrong = []
        if missing := sorted(info["missing_keys"]):
            wrong.append(f"it lacks {few(missing)}")
        if unexpected := sorted(info["unexpected_keys"]):
            wrong.append(f"it holds {few(unexpected)}, which the model does not have")
        for name, found, expected in sorted(info["mismatched_keys"]):
            wrong.append(f"{name} has shape {tuple(found)}, the model has {tuple(expected)}")
        if wrong:
            raise ValueError(
                f"the files of {self.name} do not fit {self.model_class.__name__}: {'; '.join(wrong[:FEW])}. Check "
                "`architectures` and the sizes in config.json, and that all files belong to one model"
            )


def _is_frozen_entry(name: str) -> bool:
    """Whether that is an entry of the state_dict of a frozen layer."""
    return ".quant_state." in name or name.endswith(".SCB")


def _config(folder: Path) -> transformers.PretrainedConfig:
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter: load its base model, then lq_plugin.adapters.load_adapter(model, folder)"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: pass the folder of a transformers model")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not the config of a model that is known here: {error}"
        ) from error


def _model_class(config: transformers.PretrainedConfig, folder: Path) -> type[transformers.PreTrainedModel]:
    names = config.architectures or []
    if not names:
        raise ValueError(
            f"{folder / 'config.json'} names no architectures, so that the class of the model is not known: add "
            'for example "architectures": ["LlamaForCausalLM"]'
        )
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / 'config.json'} names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have; code that comes with a model is not run"
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' bar and its report: ours are shown, and what the report says is raised."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _layer_errors() -> Iterator[None]:
    try:
        yield
    except LayerError as error:
        raise error.reason from None
