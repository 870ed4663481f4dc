"""The LoRA weights of a finished run in a folder that PEFT, transformers and the other recipes read."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lq_plugin.recipes.reports.rehearsal import is_rehearsal

BASE_FILE = "lq_base.json"  # which model the adapter was trained beside, and in which format


@runtime_checkable
class Adapted(Protocol):
    """A LightningModule with LoRA weights."""

    has_adapter: bool

    def save_adapter(self, folder: Path) -> None: ...

    def base(self) -> dict[str, Any]: ...


class AdapterFolder(Callback):
    """At the end of training writes `path`: the adapter, the tokenizer, and which base it belongs to.

    What is there already is replaced once the new one is whole. A model without an adapter writes nothing.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer) or not isinstance(pl_module, Adapted) or not pl_module.has_adapter:
            return
        fresh, old = self.path.with_name(f".{self.path.name}.new"), self.path.with_name(f".{self.path.name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        pl_module.save_adapter(fresh)
        (fresh / BASE_FILE).write_text(json.dumps(pl_module.base(), indent=2) + "\n", encoding="utf-8")
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(fresh, self.path)
        shutil.rmtree(old, ignore_errors=True)


def base_of(adapter: str | Path) -> Mapping[str, Any]:
    """source, linear and skip of the base that an adapter was trained beside; of PEFT's folders the source only."""
    folder = Path(adapter)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such adapter folder: {folder.absolute()}")
    ours, theirs = folder / BASE_FILE, folder / "adapter_config.json"
    for path in (ours, theirs):
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            return values if path == ours else {"source": values.get("base_model_name_or_path")}
    raise FileNotFoundError(f"{folder} holds no adapter: expected adapter_config.json, or {BASE_FILE} beside it")
