"""Python source code as a language modelling task on bytes."""

import torch
from lightning.pytorch import LightningDataModule

from lq_plugin.recipes.tasks.source_files import SourceFile, read_files, source_files
from lq_plugin.recipes.tasks.windows import TrainingBatches, ValidationBatches, Windows


class PythonSources(LightningDataModule):
    """The Python files below `roots`: "stdlib", "site-packages", or any folder.

    context: bytes in a window. batch_size: windows per process and step. validation_windows: how many are read at each
    validation, always the same. validation_share: of the files, picked by a hash of their names. Every file is read
    once into memory.
    """

    def __init__(
        self,
        roots: list[str],
        *,
        context: int,
        batch_size: int,
        validation_windows: int = 256,
        validation_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.batch_size = batch_size
        self.validation_windows = validation_windows
        self.seed = seed
        files = source_files(roots)
        self.training_files = [file for file in files if not file.is_validation(validation_share)]
        self.validation_files = [file for file in files if file.is_validation(validation_share)]
        self._training = self._windows(self.training_files, f"training files below {roots}", batch_size)
        self._validation = self._windows(self.validation_files, f"validation files below {roots}", 1)

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

    def _windows(self, files: list[SourceFile], what: str, at_least: int) -> Windows:
        text = read_files(files)
        if len(text) <= at_least * self.context:
            raise ValueError(
                f"the {len(files)} {what} hold {len(text)} bytes, at least {at_least * self.context + 1} are needed "
                f"for {at_least} windows of {self.context}: add files, or change data.validation_share or batch_size"
            )
        return Windows(torch.frombuffer(text, dtype=torch.uint8), self.context)
