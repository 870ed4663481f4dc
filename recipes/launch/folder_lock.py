"""One run per output folder: two would overwrite each other's checkpoints and metrics."""

import os
import socket
import time
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities.rank_zero import rank_zero_only

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


def lock_output_folder(key: str, folder: str) -> IO[str] | None:
    """Makes the folder and holds it until the returned file is closed or the process ends, however it ends.

    Leaves with a message if another process holds it. Of the processes of one run only that of rank 0 takes it. A lock
    of the whole process (POSIX fcntl, also over NFS): forked data loading workers do not keep it. Without fcntl, on
    Windows, there is no lock, and a line says so.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # set on import
        return None
    if fcntl is None:
        print(f"no lock on this system: see to it yourself that no other run writes to {folder}", flush=True)
        return None
    path = Path(folder).absolute() / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise SystemExit(
            f"the output folder {path.parent} is in use by {holder or 'another process'}. Wait for that run, stop it "
            f"(`kill <process>` has it save a checkpoint first), or choose another folder: {key}=/path/to/folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file
