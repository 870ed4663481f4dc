"""The output folder is checked before Hydra makes it and long before anything is trained."""

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class CheckOutputFolder(Callback):
    """A Hydra callback; it leaves by SystemExit, since Hydra turns any other exception of a callback into a warning."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        check_writable("hydra.sweep.dir", config.hydra.sweep.dir)


def check_writable(key: str, folder: str) -> None:
    """Leaves with a message unless the folder, or the nearest one above it that exists, can be written."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        reason = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"{existing} is not writable"
    else:
        return
    raise SystemExit(f"cannot write to the output folder {path}: {reason}. Choose another: {key}=/path/to/folder")
