"""Sequences of tokens packed into rows of at most `context`, each with positions of its own.

position_ids begin again at 0 with each sequence. transformers makes a mask of them under which no token sees those of
another sequence; see lq_plugin.layers.causal_lm.keeps_documents_apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lq_plugin.layers.chunked_cross_entropy import IGNORE_INDEX
from lq_plugin.recipes.tasks.encoding import Encoded
from lq_plugin.recipes.tasks.windows import Batch

OPEN_ROWS = 64  # rows that a sequence may still go into: a fuller packing takes a longer search
PAD_MULTIPLE = 16  # lengths of batches, so that few shapes arise


@dataclass(frozen=True)
class TokenRows:
    """tokens, counted: of all sequences, one after the other; bounds (sequences + 1,): where each begins.

    rows: for each row the numbers of its sequences.
    """

    tokens: Tensor  # int32
    counted: Tensor  # bool
    bounds: list[int]
    rows: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[Encoded], context: int, *, packing: bool, seed: int) -> "TokenRows":
        """packing: several sequences in a row, chosen in an order that depends on the seed only; else one each."""
        bounds = [0]
        for sequence in sequences:
            bounds.append(bounds[-1] + len(sequence))
        tokens = torch.tensor([token for sequence in sequences for token in sequence.tokens], dtype=torch.int32)
        counted = torch.tensor([flag for sequence in sequences for flag in sequence.counted], dtype=torch.bool)
        lengths = [end - begin for begin, end in pairwise(bounds)]
        rows = packed(lengths, context, seed) if packing else [[number] for number in range(len(lengths))]
        return cls(tokens, counted, bounds, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of tokens in rows that are as long as the longest one."""
        longest = max((self._length(row) for row in self.rows), default=0)
        return len(self.tokens) / max(1, longest * len(self.rows))

    def batch(self, numbers: Tensor) -> Batch:
        """Row numbers (B,) -> input_ids, labels and position_ids, each (B, T) int64, in pinned memory beside a GPU.

        T is the longest of the rows, rounded up. labels are those that transformers takes, -100 where no loss is
        wanted: in prompts, in padding, and for the first token of each sequence. Padding goes on with the positions
        of the last sequence, which it does not change; a row of one sequence needs no mask.
        """
        rows = [self.rows[number] for number in numbers.tolist()]
        length = -(-max(self._length(row) for row in rows) // PAD_MULTIPLE) * PAD_MULTIPLE
        inputs = torch.zeros(len(rows), length, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORE_INDEX)
        positions = torch.zeros_like(inputs)
        for place, row in enumerate(rows):
            self._fill(inputs[place], labels[place], positions[place], row)
        batch = {"input_ids": inputs, "labels": labels, "position_ids": positions}
        if torch.cuda.is_available():
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def _fill(self, inputs: Tensor, labels: Tensor, positions: Tensor, row: list[int]) -> None:
        at = 0
        for number in row:
            source = slice(self.bounds[number], self.bounds[number + 1])
            end = at + source.stop - source.start
            inputs[at:end] = self.tokens[source]
            labels[at:end] = torch.where(self.counted[source], inputs[at:end], IGNORE_INDEX)
            labels[at] = IGNORE_INDEX
            positions[at:] = torch.arange(len(positions) - at)
            at = end

    def _length(self, row: list[int]) -> int:
        return sum(self.bounds[number + 1] - self.bounds[number] for number in row)


def packed(lengths: Sequence[int], context: int, seed: int) -> list[list[int]]:
    """Numbers of sequences, row by row, so that no row is longer than `context`: best fit over a few open rows."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    closed: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # room, numbers
    for number in order:
        fitting = [place for place, (room, _) in enumerate(open_rows) if room >= lengths[number]]
        if fitting:
            place = min(fitting, key=lambda place: open_rows[place][0])
            room, row = open_rows[place]
            row.append(number)
            open_rows[place] = (room - lengths[number], row)
        else:
            open_rows.append((context - lengths[number], [number]))
        if len(open_rows) > OPEN_ROWS:
            fullest = min(range(len(open_rows)), key=lambda place: open_rows[place][0])
            closed.append(open_rows.pop(fullest)[1])
    return closed + [row for _, row in open_rows]
