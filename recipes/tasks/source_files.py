"""Python source files below a few roots, split into training and validation files by a hash of their names."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Below stdlib lies site-packages, which is a root of its own.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
HASH_BYTES = 8
FILE_END = b"\0"  # stands between two files; no Python source contains it
NAMED_ROOTS = {"stdlib": ("stdlib",), "site-packages": ("purelib", "platlib")}  # keys of sysconfig.get_paths()


@dataclass(frozen=True)
class SourceFile:
    """A file, and its name below the root that it was found under: the same on every machine."""

    path: Path
    name: str

    def is_validation(self, share: float) -> bool:
        """Whether the hash of the name is among the lowest `share` of all hashes."""
        return in_lowest_share(self.name, share)


def in_lowest_share(name: str, share: float) -> bool:
    digest = hashlib.blake2b(name.encode(), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") < share * 256**HASH_BYTES


def source_files(roots: list[str]) -> list[SourceFile]:
    """All *.py files below the roots, test folders left out, in the order of the roots and then of their names."""
    return [file for root in roots for folder in root_folders(root) for file in _files_below(folder)]


def root_folders(root: str) -> list[Path]:
    """The folders of "stdlib" or "site-packages" in this environment, or the folder that is called so."""
    paths = sysconfig.get_paths()
    names = dict.fromkeys(paths[key] for key in NAMED_ROOTS[root]) if root in NAMED_ROOTS else [root]
    folders = [Path(name).expanduser() for name in names]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no such data folder: {folder.absolute()}. data.roots got {root!r}; it takes folders that exist, "
                "'stdlib' (the sources of this Python) and 'site-packages' (those of the installed packages)"
            )
    return folders


def read_files(files: list[SourceFile]) -> bytearray:
    """The bytes of all files, a zero byte between two of them."""
    return bytearray(FILE_END.join(file.path.read_bytes() for file in files))


def _files_below(folder: Path) -> list[SourceFile]:
    found = ((path, path.relative_to(folder)) for path in folder.rglob("*.py"))
    files = [SourceFile(path, name.as_posix()) for path, name in found if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1])]
    return sorted((file for file in files if file.path.is_file()), key=lambda file: file.name)
