"""The topics of Python's help system as text: found on every machine, in English, unlike the sources."""

from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningDataModule

from lq_plugin.recipes.tasks.source_files import FILE_END, in_lowest_share
from lq_plugin.recipes.tasks.windows import TrainingBatches, ValidationBatches, Windows


class TopicsText(LightningDataModule):
    """What `help("topics")` lists, as bytes; topics are held out by a hash of their names.

    context: bytes in a window. batch_size: windows per process and step. validation_windows: how many are read at each
    validation, always the same. validation_share: of the topics.
    """

    def __init__(
        self,
        *,
        context: int,
        batch_size: int,
        validation_windows: int = 64,
        validation_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.validation_windows = validation_windows
        self.seed = seed
        held_out = {name for name in topics if in_lowest_share(name, validation_share)}
        self._training = self._windows({name: text for name, text in topics.items() if name not in held_out})
        self._validation = self._windows({name: topics[name] for name in held_out})

    def train_dataloader(self) -> TrainingBatches:
        trainer = self.trainer
        assert trainer is not None, "Lightning attaches the Trainer before it asks for data"
        done = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        return TrainingBatches(
            self._training, self.batch_size, self.seed, done, trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> ValidationBatches:
        trainer = self.trainer
        assert trainer is not None, "Lightning attaches the Trainer before it asks for data"
        return ValidationBatches(
            self._validation, self.validation_windows, self.batch_size, trainer.global_rank, trainer.world_size
        )

    def _windows(self, texts: dict[str, str]) -> Windows:
        text = bytearray(FILE_END.join(texts[name].encode() for name in sorted(texts)))
        if len(text) <= self.batch_size * self.context:
            raise ValueError(
                f"{len(texts)} topics hold {len(text)} bytes, {self.batch_size} windows of {self.context} need more: "
                "lower data.batch_size or data.context, or change data.validation_share"
            )
        return Windows(torch.frombuffer(text, dtype=torch.uint8), self.context)
