"""Checkpoints that are whole or absent: written beside the target, flushed to disk, then renamed over it.

Lightning writes into the temporary folder and moves the file, which is a copy where that is another file system. A
checkpoint is a zip archive with a CRC-32 of every record: loading checks them, so a damaged file is an error and
never a silently different model.
"""

import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

_PARTIAL = ".partial"
_HOST = socket.gethostname().replace(".", "_")  # dots separate the parts of a partial file's name
_WRITING: set[Path] = set()  # partial files of this process that are being written

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
            _refuse_objects(file, path)

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


def _refuse_objects(file: IO[bytes], path: _PATH) -> None:
    """ValueError while there still is a run to mend: a checkpoint with Python objects would not load."""
    file.flush()
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
    except _DAMAGE:  # cut short: the disk is full, which is said next
        return
    if objects:
        raise ValueError(
            f"the checkpoint for {path} holds Python objects, which would not be loaded again: {', '.join(objects)}. "
            "Save hyperparameters as numbers, strings, lists and dicts, or use save_hyperparameters(ignore=...)"
        )


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
    """A file to write that takes the place of `path` when the block ends well, and leaves no trace when it does not.

    It is called .<name>.<host>-<pid>.partial meanwhile. What processes of this host left that were killed while they
    wrote into the folder is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    partial = path.absolute().with_name(f".{path.name}.{_HOST}-{os.getpid()}{_PARTIAL}")
    _WRITING.add(partial)
    try:
        with open(partial, "wb") as file:
            measured = _Measured(file)
            yield measured  # type: ignore[misc]
            measured.finish(path)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        _WRITING.discard(partial)


def _remove_abandoned(folder: Path) -> None:
    """Partial files of other hosts stay: whether their processes live cannot be known from here."""
    ours = re.compile(rf"\..*\.{re.escape(_HOST)}-(\d+){re.escape(_PARTIAL)}")
    for path in folder.absolute().glob(f".*{_PARTIAL}"):
        match = ours.fullmatch(path.name)
        if match and not _being_written(path, int(match[1])):
            path.unlink(missing_ok=True)


def _being_written(partial: Path, pid: int) -> bool:
    if pid == os.getpid():  # in a container that was started again, perhaps also the pid of the one that was killed
        return partial in _WRITING
    return _lives(pid)


def _lives(pid: int) -> bool:
    """Windows cannot ask without sending: there every process counts as living, and partial files stay."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no pid of this system
        return True
    return True


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

    @property
    def name(self) -> str:
        return self._file.name

    def flush(self) -> None:
        if self._error is None:
            try:
                self._file.flush()
            except OSError as error:
                self._error = error

    def finish(self, path: Path) -> None:
        """Puts what was written on disk; OSError if any of it could not be."""
        self.flush()
        if self._error is None:
            try:
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
