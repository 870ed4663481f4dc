"""Tensors written one after another into safetensors files of bounded size, with transformers' index beside them."""

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_METADATA = {"format": "pt"}  # without it transformers does not read a file


def size_in_bytes(size: int | str) -> int:
    """5000000000 or "5GB" -> 5000000000; units of 1000. ValueError: anything else, or nothing."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?B)?", str(size).strip().upper())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"max_shard_size must be a number of bytes or a text such as '5GB', got {size!r}")
    return int(match[1]) * _UNITS.get(match[2] or "", 1)


class ShardWriter:
    """Holds one shard in memory; a tensor that is larger than max_shard_size has a shard of its own.

    One shard is <stem>.safetensors; several are <stem>-00001-of-00002.safetensors and so on, with
    <stem>.safetensors.index.json.
    """

    def __init__(self, folder: Path, stem: str = "model", max_shard_size: int | str = "5GB") -> None:
        self._folder, self._stem = folder, stem
        self._limit = size_in_bytes(max_shard_size)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """The tensor is copied to the CPU when it is not there, and written with its shard."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes what is left, gives the files their names, and writes the index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [self._name(number, count) for number in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self._folder / name)
        if count > 1:
            weight_map = {tensor: names[number] for number, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata=_METADATA)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f".{self._stem}-{number}.part"

    def _name(self, number: int, count: int) -> str:
        if count == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"
