"""The safetensors files of a checkpoint: found by their index, looked through before anything is built, read by tensor.

Source: https://huggingface.co/docs/safetensors/index#format (a file is a header of names, dtypes, shapes and offsets,
then the bytes) and transformers' `model.safetensors.index.json` (`weight_map`: tensor name -> file name).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Of each file, in a fingerprint
_SAMPLES, _SAMPLE_BYTES = 64, 4096

# safetensors' names of element types
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor; dtype is None where torch has none of that name."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one or more files by name; a name stands in one file only."""

    tensors: dict[str, TensorInfo] = field(repr=False)

    @classmethod
    def of(cls, source: str | Path | Iterable[str | Path]) -> "TensorFiles":
        """source: a folder with model.safetensors or its index, a file, or several files. Only headers are read.

        FileNotFoundError: no such file, or one that the index names is missing. ValueError: a file that is cut short
        or damaged, an index that names a file outside the folder or a tensor that its file does not hold, a tensor
        that two files hold.
        """
        if isinstance(source, str | Path) and Path(source).is_dir():
            return cls._in_folder(Path(source))
        paths = [source] if isinstance(source, str | Path) else list(source)
        if not paths:
            raise ValueError("no file was given: pass a folder, a .safetensors file, or several")
        return cls._merged(Path(path) for path in paths)

    @classmethod
    def _in_folder(cls, folder: Path) -> "TensorFiles":
        if (folder / WEIGHTS).is_file():
            return cls._merged([folder / WEIGHTS])
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(_nothing_in(folder))
        homes = weight_map(folder / INDEX)
        files = {name: folder / name for name in sorted(set(homes.values()))}
        if absent := [name for name, path in files.items() if not path.is_file()]:
            raise FileNotFoundError(
                f"{folder / INDEX} names {len(files)} files, of which {', '.join(absent)} are missing from the folder: "
                "download or copy them again"
            )
        found = cls._merged(files.values())
        for tensor, name in homes.items():
            if tensor not in found.tensors or found.tensors[tensor].file != files[name]:
                raise ValueError(f"{folder / INDEX} says that {name} holds {tensor!r}, which it does not")
        return found

    @classmethod
    def _merged(cls, paths: Iterable[Path]) -> "TensorFiles":
        tensors: dict[str, TensorInfo] = {}
        for path in paths:
            for name, info in _header(path).items():
                if name in tensors:
                    raise ValueError(f"{name!r} stands in {tensors[name].file} and in {path}: pass one of them")
                tensors[name] = info
        return cls(tensors)

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @contextmanager
    def reader(self) -> Iterator["TensorReader"]:
        """Files are opened when they are first read from and closed with the block."""
        with ExitStack() as stack:
            yield TensorReader(self, stack)

    def fingerprint(self) -> str:
        """Of names, sizes, times of change, headers and samples of the bytes, without a read of all weights.

        The samples are for copies that set all times alike, as archives and images do.
        """
        digest = hashlib.sha256()
        for path in self.files:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode())
            with open(path, "rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(header))
                for place in range(_SAMPLES):
                    file.seek(8 + header + (stat.st_size - 8 - header) * place // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


class TensorReader:
    def __init__(self, files: TensorFiles, stack: ExitStack) -> None:
        self._files = files
        self._stack = stack
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self._files.tensors)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        path = self._files.tensors[name].file
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._open[path].get_tensor(name).to(device)
        except SafetensorError as error:
            raise _damaged(path, error) from error


def _header(path: Path) -> dict[str, TensorInfo]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix != ".safetensors":
        raise ValueError(f"expected .safetensors files, got {path.name}: {_CONVERT}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            return {
                name: TensorInfo(path, tuple(x.get_shape()), _DTYPES.get(x.get_dtype())) for name, x in slices.items()
            }
    except SafetensorError as error:
        raise _damaged(path, error) from error


def weight_map(index: Path) -> dict[str, str]:
    """tensor -> file, as an index says; ValueError for one that is none, or that names a file elsewhere."""
    try:
        pairs = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index, which is a JSON object with a weight_map: {error}") from error
    for tensor, name in pairs.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise ValueError(f"{index} places {tensor!r} in {name!r}: expected a .safetensors file in its own folder")
    return pairs


def _stays_inside(name: str) -> bool:
    """Judged by the name: files of a hub's cache are links that lead out of the folder."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return name.endswith(".safetensors") and not any(path.anchor or ".." in path.parts for path in kinds)


FEW = 6  # names or faults in a message


def few(names: list[str]) -> str:
    """The first names as text, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


_CONVERT = "pickled files are not read; convert them with transformers, model.save_pretrained(folder)"


def _nothing_in(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    hint = f"it has {', '.join(pickled)}: {_CONVERT}" if pickled else f"it has {', '.join(found[:8]) or 'no files'}"
    return f"{folder} has neither {WEIGHTS} nor {INDEX}; {hint}"


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is cut short or damaged ({error}): download or copy it again")
