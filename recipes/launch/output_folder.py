"""The output folder is checked and locked before Hydra writes to it and long before anything is trained."""

import os
from pathlib import Path
from typing import IO, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lq_plugin.recipes.launch.folder_lock import lock_output_folder


class CheckOutputFolder(Callback):
    """A Hydra callback; it leaves by SystemExit, since Hydra turns any other exception of a callback into a warning."""

    def __init__(self) -> None:
        self._lock: IO[str] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take("hydra.run.dir", config.hydra.run.dir, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._take("hydra.sweep.dir", config.hydra.sweep.dir, config)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._release()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._release()

    def _take(self, key: str, folder: str, config: DictConfig) -> None:
        check_writable(key, folder)
        if not config.trainer.fast_dev_run:  # which writes nothing
            self._lock = lock_output_folder(key, folder)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()


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
