"""Any text or instruction data for a language model with a tokenizer: encoded once, packed, in seeded order."""

from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lq_plugin.recipes.tasks.encoding import Encoded, Encoder, cut
from lq_plugin.recipes.tasks.samples import Sample, Text, read_samples
from lq_plugin.recipes.tasks.token_rows import TokenRows
from lq_plugin.recipes.tasks.tokenizer import tokenizer_of
from lq_plugin.recipes.tasks.windows import TrainingBatches, ValidationBatches

T = TypeVar("T")

LONG = ("auto", "truncate", "split", "error")
SPLIT_SEED = 0  # of what is held out: the same for every seed of a run


class TextData(LightningDataModule):
    """source, split, columns: what `read_samples` takes. tokenizer: the folder or hub name of a model.

    context: tokens in a row. batch_size: rows per process and step. validation: another source, or None: a share of
    `validation_share` of the samples is held out, always the same. validation_rows: how many are read at each
    validation. packing: several samples in a row, which do not see each other; else one, padded. template, loss_on:
    what `Encoder` takes. long: samples above the context are cut off ("truncate"), go on in another row ("split"), or
    raise ("error"); "auto" splits texts and truncates dialogues. limit: samples of the source to read.
    """

    def __init__(
        self,
        source: str,
        *,
        tokenizer: str,
        context: int = 1024,
        batch_size: int = 4,
        split: str = "train",
        columns: dict[str, str] | None = None,
        validation: str | None = None,
        validation_split: str = "train",
        validation_share: float = 0.05,
        validation_rows: int = 64,
        packing: bool = True,
        template: str = "chat",
        loss_on: str = "answers",
        long: str = "auto",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if long not in LONG:
            raise ValueError(f"long is one of {', '.join(LONG)}, got {long!r}")
        if context < 2 or batch_size < 1:
            raise ValueError(f"context must be at least 2 and batch_size at least 1, got {context} and {batch_size}")
        self.context = context
        self.batch_size = batch_size
        self.packing = packing
        self.long = long
        self.validation_rows = validation_rows
        self.seed = seed
        self.encoder = Encoder(tokenizer_of(tokenizer), template, loss_on)
        training = read_samples(source, split=split, columns=columns)[:limit]
        if validation is None:
            training, held_out = hold_out(training, validation_share)
        else:
            held_out = read_samples(validation, split=validation_split, columns=columns)
        self._training = self._rows(training, f"training samples of {source}", batch_size)
        self._validation = self._rows(held_out, "held-out samples", 1) if held_out else None

    def train_dataloader(self) -> TrainingBatches:
        trainer = self._trainer()
        done = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        return TrainingBatches(
            self._training, self.batch_size, self.seed, done, trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> ValidationBatches | list:
        if self._validation is None:
            return []
        trainer = self._trainer()
        return ValidationBatches(
            self._validation, self.validation_rows, self.batch_size, trainer.global_rank, trainer.world_size
        )

    def _trainer(self) -> Any:
        assert self.trainer is not None, "Lightning attaches the Trainer before it asks for data"
        return self.trainer

    def _rows(self, samples: list[Sample], what: str, at_least: int) -> TokenRows:
        sequences, notes = encode_all(samples, self.encoder, self.context, self.long)
        if not sequences:
            raise ValueError(
                f"none of the {len(samples)} {what} has a token to learn within {self.context} tokens{notes}"
            )
        rows = TokenRows.of(sequences, self.context, packing=self.packing, seed=SPLIT_SEED)
        learned = float(rows.counted.float().mean())
        _say(
            f"{len(samples):,} {what}: {len(rows.tokens):,} tokens, {learned:.0%} of them learned, in {len(rows):,} "
            f"rows of at most {self.context}, {rows.fill:.0%} full{notes}"
        )
        if len(rows) < at_least:
            raise ValueError(
                f"the {what} make {len(rows)} rows of {self.context} tokens, fewer than data.batch_size={at_least}: "
                "lower data.batch_size or data.context, pass data.packing=false, or take more samples"
            )
        return rows


def hold_out(samples: list[T], share: float) -> tuple[list[T], list[T]]:
    """The samples to train on and those held out: at least one of each if there are two; none for a share of 0."""
    number = min(len(samples) - 1, max(1, round(share * len(samples)))) if share > 0 else 0
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    chosen = set(order[:number])
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


def encode_all(samples: list[Sample], encoder: Encoder, context: int, long: str) -> tuple[list[Encoded], str]:
    """All sequences with a token to learn, and a note about samples that were too long or had none."""
    sequences: list[Encoded] = []
    too_long = lost = 0
    for sample in samples:
        way = long if long != "auto" else "split" if isinstance(sample, Text) else "truncate"
        for encoded in encoder.encode(sample):
            if len(encoded) > context and way == "error":
                raise ValueError(
                    f"a sample has {len(encoded)} tokens, more than data.context={context}: raise it, or pass "
                    f"data.long=truncate or split. It begins {_beginning(sample)!r}"
                )
            parts = list(cut(encoded, context, way))
            too_long += len(encoded) > context
            lost += not parts
            sequences += parts
    notes = [f"{too_long:,} longer than that and cut"] if too_long else []
    notes += [f"{lost:,} left out, without a token to learn in them"] if lost else []
    return sequences, "".join(f"; {note}" for note in notes)


def _beginning(sample: Sample) -> str:
    text = sample.text if isinstance(sample, Text) else sample.messages[0]["content"]
    return text[:60]


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
