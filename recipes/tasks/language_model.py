"""The LightningModule of the byte-level GPT: loss, optimizer groups, cosine schedule, and writing text."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lq_plugin.recipes.tasks.gpt import GPT
from lq_plugin.recipes.tasks.windows import Batch

BYTES = 256
FINAL_LR_SHARE = 0.05  # the learning rate ends here: nothing is gained at exactly zero


class ByteLanguageModel(LightningModule):
    """A GPT over bytes, trained to predict the next one; logs train/ and val/bits_per_byte.

    optimizer: makes an optimizer from parameter groups. Matrices decay, vectors do not. The learning rate rises for
    `warmup_steps` and then falls along a cosine until the Trainer's max_steps.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        context: int,
        warmup_steps: int = 0,
        optimizer: Callable[[list[dict]], Optimizer] = AdamW,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"], logger=False)
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer
        self.gpt = GPT(vocabulary=BYTES, width=width, depth=depth, heads=heads, context=context)
        self.flops_per_token = training_flops_per_token(self.gpt, width, depth, context)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/bits_per_byte", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        bits = self._loss(batch) / math.log(2)
        self.log("val/bits_per_byte", bits, prog_bar=True, sync_dist=True, batch_size=len(batch["labels"]))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Has the last step validated, wherever it falls: Lightning validates when it is told to stop."""
        if self.trainer.global_step >= self.trainer.max_steps > 0:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        steps = int(self.trainer.estimated_stepping_batches)
        if steps < 1:
            raise ValueError(f"the cosine schedule ends at trainer.max_steps, which must be positive; it is {steps}")
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        optimizer = self.optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
        schedule = LambdaLR(optimizer, partial(cosine_share, warmup_steps=self.warmup_steps, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def write(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        """The prompt and the `length` bytes that the model puts after it; the same for the same weights and seed."""
        tokens = torch.tensor(list(prompt.encode()), device=self.device)
        generator = torch.Generator().manual_seed(seed)
        written = self.gpt.generate(tokens, length, temperature, generator)
        return bytes(written.tolist()).decode(errors="replace")

    def _loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats per byte, in float32."""
        return F.cross_entropy(self(batch["input_ids"]).float().flatten(0, 1), batch["labels"].flatten())


def cosine_share(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a line up to 1, then half a cosine down to FINAL_LR_SHARE."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2


def training_flops_per_token(model: nn.Module, width: int, depth: int, context: int) -> int:
    """6 N + 12 * depth * width * context, with N the parameters outside of the embedding; the head is a matrix product.

    Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311; it counts the whole attention matrix, also above the
    diagonal that a causal model skips.
    """
    embedded = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    parameters = sum(p.numel() for p in model.parameters()) - embedded
    return 6 * parameters + 12 * depth * width * context
