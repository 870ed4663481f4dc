"""The LightningModule of the byte-level GPT: its loss, and writing text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from lq_plugin.recipes.tasks.gpt import GPT
from lq_plugin.recipes.tasks.scheduled import MakeOptimizer, ScheduledModule
from lq_plugin.recipes.tasks.scheduled import cosine_share as cosine_share
from lq_plugin.recipes.tasks.windows import Batch

BYTES = 256


class ByteLanguageModel(ScheduledModule):
    """A GPT over bytes, trained to predict the next one; logs train/ and val/bits_per_byte."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        context: int,
        warmup_steps: int = 0,
        optimizer: MakeOptimizer = AdamW,
    ) -> None:
        super().__init__(warmup_steps, optimizer)
        self.save_hyperparameters("width", "depth", "heads", "context", "warmup_steps", logger=False)
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

    def write(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        """The prompt and the `length` bytes that the model puts after it; the same for the same weights and seed."""
        tokens = torch.tensor(list(prompt.encode()), device=self.device)
        generator = torch.Generator().manual_seed(seed)
        written = self.gpt.generate(tokens, length, temperature, generator)
        return bytes(written.tolist()).decode(errors="replace")

    def _loss(self, batch: Batch) -> Tensor:
        """Cross entropy in nats per byte, in float32."""
        return F.cross_entropy(self(batch["input_ids"]).float().flatten(0, 1), batch["labels"].flatten())


def training_flops_per_token(model: nn.Module, width: int, depth: int, context: int) -> int:
    """6 N + 12 * depth * width * context, with N the parameters outside of the embedding; the head is a matrix product.

    Source: PaLM, appendix B, https://arxiv.org/abs/2204.02311; it counts the whole attention matrix, also above the
    diagonal that a causal model skips.
    """
    embedded = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    parameters = sum(p.numel() for p in model.parameters()) - embedded
    return 6 * parameters + 12 * depth * width * context
