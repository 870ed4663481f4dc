"""Checkpoints that are whole or absent: written beside the target, flushed to disk, then renamed over it.

Lightning writes into the temporary folder and moves the file, which is a copy where that is another file system. A
checkpoint is a zip archive with a CRC-32 of every record: loading checks them, so a damaged file is an error and
never a silently different model.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

_PARTIAL = ".partial"

# What Python's and PyTorch's zip readers raise, by the field that is damaged.
_DAMAGE = (zipfile.BadZipFile, UnicodeDecodeError, EOFError, RuntimeError, OSError)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that is cut short or whose contents changed since it was written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """`Trainer(plugins=[QuantPlugin(), AtomicCheckpointIO()])`; remote targets (s3://, ...) stay Lightning's.

    A save that fails leaves the previous file as it was, removes what it had written and raises OSError with the file
    and the bytes that it needed. Loading raises DamagedCheckpointError for a file that is not whole, and ValueError
    for one that holds anything but tensors and plain values: nothing is unpickled.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if _is_remote(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: _PATH, map_location: Callable[..., Any] | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The checkpoint, on the CPU unless map_location says otherwise; weights_only=False is refused."""
        if weights_only is False:
            raise ValueError(
                "AtomicCheckpointIO unpickles nothing, got weights_only=False; pass weights_only=None or True"
            )
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        check(Path(path))
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds Python objects, which can run code when they are loaded; expected tensors and plain "
                f"values only. Save hyperparameters as numbers, strings, lists and dicts ({error})"
            ) from error
        except _DAMAGE as error:
            raise DamagedCheckpointError(f"{path} is not a whole checkpoint ({error}); take an earlier one") from error


def check(path: Path) -> None:
    """Reads a checkpoint through; DamagedCheckpointError unless it is whole, OSError if it cannot be opened."""
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()
        except _DAMAGE as error:
            raise DamagedCheckpointError(f"{path} is not a whole checkpoint ({error}); take an earlier one") from error
    if damaged is not None:
        raise DamagedCheckpointError(
            f"{path} is damaged: the checksum of its record {damaged} differs; take an earlier one"
        )


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        with open(partial, "wb") as file:
            measured = _Measured(file)
            yield measured  # type: ignore[misc]
            measured.finish(path)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


class _Measured:
    """Counts what is written, also past the first error: torch.save replaces an OSError by a less telling one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = 0
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        size = memoryview(data).nbytes
        self._size += size
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return size

    def flush(self) -> None:
        pass

    def finish(self, path: Path) -> None:
        """Puts what was written on disk; OSError if any of it could not be."""
        if self._error is None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                self._error = error
        if self._error is not None:
            reason = os.strerror(self._error.errno or 0)
            raise OSError(
                self._error.errno,
                f"{reason}; the checkpoint needs {self._size:,} bytes there, and the previous file was left as it was",
                str(path),
            ) from self._error


def _sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_remote(path: _PATH) -> bool:
    return "://" in str(path)
