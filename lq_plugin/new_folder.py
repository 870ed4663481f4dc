"""Folders that are whole or absent: written beside the target, flushed to disk, then renamed to it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well, and leaves no trace when it does not.

    FileExistsError: there is something at `target` already, other than an empty folder; it is left as it is.
    """
    target = Path(target).absolute()
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        _sync(partial)
        partial.chmod(0o777 & ~_umask())
        refuse_existing(target)
        os.replace(partial, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} is there already and is left as it is: name a new folder, or remove it first")


def _umask() -> int:
    """mkdtemp makes folders that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """A rename is on disk once its folder is. Windows cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
