"""Batches of fixed-size windows of a text: endless and in seeded order for training, a fixed choice for validation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Numbered(Protocol):
    """Windows or rows of tokens by number."""

    def __len__(self) -> int: ...

    def batch(self, numbers: Tensor) -> Batch: ...


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of `context` bytes that do not overlap; the label of a byte is the byte after it."""

    text: Tensor  # (bytes,) uint8
    context: int

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def batch(self, numbers: Tensor) -> Batch:
        """Window numbers (B,) -> input_ids and labels, each (B, context) int64, in pinned memory beside a GPU."""
        positions = numbers[:, None] * self.context + torch.arange(self.context)
        batch = {"input_ids": self.text[positions].long(), "labels": self.text[positions + 1].long()}
        if torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch


@dataclass(frozen=True)
class TrainingBatches:
    """Batch number n of a run depends on (seed, n) only, so that a resumed run goes on where it stopped.

    Every window comes once before any comes again. Of the batches from `first` on, each of `processes` takes its own.
    """

    windows: Numbered
    batch_size: int
    seed: int
    first: int = 0
    rank: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[Batch]:
        batches_per_pass = len(self.windows) // self.batch_size
        shuffled_for, order = -1, torch.empty(0)
        for number in count(self.first + self.rank, self.processes):
            data_pass, place = divmod(number, batches_per_pass)
            if data_pass != shuffled_for:
                generator = torch.Generator().manual_seed(self.seed + data_pass)
                shuffled_for, order = data_pass, torch.randperm(len(self.windows), generator=generator)
            yield self.windows.batch(order[place * self.batch_size : (place + 1) * self.batch_size])


@dataclass(frozen=True)
class ValidationBatches:
    """At most `number` windows, spread evenly over the text: always the same, and each process takes its own."""

    windows: Numbered
    number: int
    batch_size: int
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[Batch]:
        return map(self.windows.batch, self._batches())

    def _batches(self) -> tuple[Tensor, ...]:
        chosen = torch.linspace(0, len(self.windows) - 1, min(self.number, len(self.windows))).long()
        return chosen[self.rank :: self.processes].split(self.batch_size)
