"""A text that the trained model wrote."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lq_plugin.recipes.reports.rehearsal import is_rehearsal


@runtime_checkable
class Writer(Protocol):
    """A model that writes: ByteLanguageModel bytes, CausalLM tokens."""

    def write(self, prompt: str, length: int, temperature: float, seed: int) -> str: ...


class TextSample(Callback):
    """At the end of training writes to `path` the prompt and what the model puts after it, `length` bytes or tokens.

    temperature: 0 takes the likeliest token, where the model can.
    """

    def __init__(self, path: str, *, prompt: str, length: int, temperature: float, seed: int = 0) -> None:
        if not prompt or temperature < 0:
            raise ValueError(f"the prompt must not be empty nor the temperature < 0, got {prompt!r} and {temperature}")
        self.path = Path(path)
        self.prompt = prompt
        self.length = length
        self.temperature = temperature
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Writer):
            raise TypeError(
                f"TextSample asks a language model to write, got {type(pl_module).__name__}; pass ~callbacks.sample"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Writer), "setup checks it"
        length = 1 if is_rehearsal(trainer) else self.length
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            text = pl_module.write(self.prompt, length, self.temperature, self.seed)
        pl_module.train()
        if not is_rehearsal(trainer):
            self._save(text)

    @rank_zero_only
    def _save(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")
