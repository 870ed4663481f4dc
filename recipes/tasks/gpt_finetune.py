"""QLoRA without a download: the GPT of this project learns Python's sources, is frozen in few bits, and gets LoRA."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lq_plugin.recipes.tasks.language_model import ByteLanguageModel
from lq_plugin.recipes.tasks.scheduled import MakeOptimizer, cosine_share
from lq_plugin.recipes.tasks.source_files import read_files, source_files
from lq_plugin.recipes.tasks.windows import TrainingBatches, Windows

WARMUP_STEPS = 50
LINES = 5  # of progress


@dataclass(frozen=True)
class Pretraining:
    """A plain loop over the Python files below `roots`, in float32; `file` keeps the weights.

    Source files are those of experiment=bytes_gpt; all of them are learned.
    """

    roots: list[str]
    steps: int
    lr: float
    batch_size: int
    file: str
    seed: int = 0

    def run(self, model: nn.Module, context: int, device: torch.device) -> None:
        """Trains the model, tokens (B, T) -> logits (B, T, 256), and writes `file`."""
        text = torch.frombuffer(read_files(source_files(self.roots)), dtype=torch.uint8)
        batches = iter(TrainingBatches(Windows(text, context), self.batch_size, self.seed))
        optimizer = AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.1)
        share = partial(cosine_share, warmup_steps=min(WARMUP_STEPS, self.steps // 2), steps=self.steps)
        schedule = LambdaLR(optimizer, share)
        model.to(device).train()
        for step in range(1, self.steps + 1):
            batch = next(batches)
            logits = model(batch["input_ids"].to(device))
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].to(device).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // LINES) == 0 or step == self.steps:
                bits = float(loss.detach()) / math.log(2)
                print(f"learning Python: step {step}/{self.steps}  loss {bits:.2f}", flush=True)
        Path(self.file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, self.file)


class FrozenByteModel(ByteLanguageModel):
    """A ByteLanguageModel that was pre-trained, is frozen in the format `linear`, and learns by LoRA.

    The pre-trained weights are read if their file is there, and made otherwise, by the first process.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        context: int,
        linear: Any,
        lora: Any,
        pretraining: Pretraining,
        warmup_steps: int = 0,
        optimizer: MakeOptimizer = AdamW,
    ) -> None:
        super().__init__(
            width=width, depth=depth, heads=heads, context=context, warmup_steps=warmup_steps, optimizer=optimizer
        )
        self.context = context
        self.pretraining = pretraining
        self._linear, self._lora = linear, lora
        self._converted = False

    def prepare_data(self) -> None:
        """Called by one process of each machine, before the model is set up."""
        if not Path(self.pretraining.file).exists():
            self.pretraining.run(self.gpt, self.context, self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        if self._converted:
            return
        from lq_plugin import convert

        self.gpt.load_state_dict(load_file(self.pretraining.file))
        self.gpt.to(self.trainer.strategy.root_device)
        conversion = convert(self.gpt, self._linear, lora=self._lora)
        self._converted = True
        _say(f"frozen: {conversion.share:.1%} of the weights outside the embeddings")

    @property
    def has_adapter(self) -> bool:
        return True

    def save_adapter(self, folder: Path) -> None:
        from lq_plugin.adapters import save_adapter

        save_adapter(self.gpt, folder)

    def base(self) -> dict[str, Any]:
        return {"source": self.pretraining.file, "linear": self._linear if isinstance(self._linear, str) else None}


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
