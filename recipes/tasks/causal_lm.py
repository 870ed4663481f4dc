"""The LightningModule of any transformers causal language model: loaded frozen and quantised, trained by LoRA."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lq_plugin.layers.causal_lm import causal_lm_loss, check_output_layer, keeps_documents_apart
from lq_plugin.layers.chunked_cross_entropy import IGNORE_INDEX
from lq_plugin.recipes.tasks.encoding import Encoder
from lq_plugin.recipes.tasks.scheduled import MakeOptimizer, ScheduledModule
from lq_plugin.recipes.tasks.tokenizer import tokenizer_of
from lq_plugin.recipes.tasks.windows import Batch
from lq_plugin.recipes.tasks.writing import Sampling, answer

LOSSES = ("chunked", "whole_logits")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOPS_TRAINED, FLOPS_FROZEN = 6, 4  # per weight and token; a frozen one has no weight gradient


class CausalLM(ScheduledModule):
    """Logs train/loss and val/loss, in nats per token that is learned.

    source: a folder or hub name. linear, skip, lora, cache: what lq_plugin.loading.load_pretrained takes; lora=None
    trains all that is not frozen. dtype: of what is not quantised, "auto" is bfloat16 on a GPU and float32 elsewhere.
    loss: "chunked" never holds all logits; "whole_logits" is for models whose logits it cannot compute.
    gradient_checkpointing: layers are computed again in the backward pass; their activations are not kept. compile: the
    decoder by torch.compile. lora_plus_ratio: B learns so many times as fast as A (LoRA+), None: as fast.
    template: what `Encoder` takes, for what the model writes.
    """

    def __init__(
        self,
        source: str,
        *,
        linear: Any = "nf4",
        lora: Any = None,
        skip: Iterable[str] = (),
        cache: str | None = None,
        dtype: str = "auto",
        loss: str = "chunked",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        lora_plus_ratio: float | None = None,
        template: str = "chat",
        warmup_steps: int = 0,
        optimizer: MakeOptimizer = AdamW,
    ) -> None:
        super().__init__(warmup_steps, optimizer)
        if loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, got {loss!r}")
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype is auto, {', '.join(DTYPES)}, got {dtype!r}")
        self.save_hyperparameters({"source": source, "loss": loss}, logger=False)
        self.source = source
        self._loading = {"linear": linear, "lora": lora, "skip": tuple(skip), "cache": cache}
        self._dtype_name = dtype
        self.loss = loss
        self._checkpoints_activations = gradient_checkpointing
        self._compiles = compile
        self._lora_plus_ratio = lora_plus_ratio
        self._encoder = Encoder(tokenizer_of(source), template)
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from lq_plugin.loading import load_pretrained

        device = self.trainer.strategy.root_device
        self.model = load_pretrained(
            self.source, device=device, dtype=dtype_on(device, self._dtype_name), **self._loading
        )
        self.model.train()
        if self._checkpoints_activations:
            checkpoint_activations(self.model)
        if self._compiles:
            self.model.get_decoder().compile()
        self.flops_per_token = flops_per_token(self.model)

    def on_fit_start(self) -> None:
        """Says at once what would go wrong silently."""
        with self.trainer.precision_plugin.forward_context():
            if self.loss == "chunked":
                check_output_layer(self.model)
            data = self.trainer.datamodule  # type: ignore[attr-defined]  # a connector sets it
            if getattr(data, "packing", False) and not keeps_documents_apart(self.model):
                raise ValueError(
                    f"{type(self.model).__name__} lets the samples of a row see each other: pass data.packing=false"
                )
        self._check_sizes(getattr(data, "context", 0))

    def parameter_groups(self) -> list[dict]:
        if self._lora_plus_ratio is None:
            return super().parameter_groups()
        from lq_plugin.adapters import lora_plus_groups

        defaults = self.optimizer([{"params": [torch.zeros(1)]}]).defaults
        decay = defaults.get("weight_decay", 0.0)
        return lora_plus_groups(self.model, defaults["lr"], self._lora_plus_ratio, weight_decay=decay)

    def forward(self, **batch: Tensor) -> Tensor:
        return self._loss(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        learned = int((batch["labels"] != IGNORE_INDEX).sum())
        self.log("val/loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=learned)

    def write(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        """The prompt, and the answer of at most `length` tokens below it."""
        sampling = Sampling(length, temperature, seed=seed)
        return f"{prompt}\n\n{answer(self.model, self._encoder, prompt, sampling)}"

    def save_adapter(self, folder: Path) -> None:
        """The LoRA weights as PEFT keeps them, with the tokenizer beside them."""
        from lq_plugin.adapters import save_adapter

        save_adapter(self.model, folder, base_model=self.source)
        self._encoder.tokenizer.save_pretrained(str(folder))

    def base(self) -> dict[str, Any]:
        """How to load what the adapter was trained beside; a format that is no name is left out."""
        linear = self._loading["linear"]
        named = linear if linear is None or isinstance(linear, str) else None
        return {"source": str(self.source), "linear": named, "skip": list(self._loading["skip"])}

    @property
    def has_adapter(self) -> bool:
        return self._loading["lora"] is not None

    def _loss(self, batch: Batch) -> Tensor:
        if self.loss == "whole_logits":
            return self.model(**batch, use_cache=False).loss
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("input_ids", "labels")}
        return causal_lm_loss(self.model, batch["input_ids"], batch["labels"], **inputs)  # type: ignore[arg-type]

    def _check_sizes(self, context: int) -> None:
        words, rows = len(self._encoder.tokenizer), self.model.get_input_embeddings().weight.shape[0]
        if words > rows:
            raise ValueError(f"the tokenizer knows {words} tokens, the model has {rows}: they do not belong together")
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and context > positions:
            raise ValueError(f"data.context={context} is beyond the {positions} positions of the model: lower it")


def checkpoint_activations(model: Any) -> None:
    """Has layers computed again in the backward pass, so that their activations are not kept."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its earlier name in transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def dtype_on(device: torch.device, name: str = "auto") -> torch.dtype:
    """Of what is not quantised: bfloat16 on a GPU, float32 elsewhere, or the one that is named."""
    return DTYPES[name] if name != "auto" else torch.bfloat16 if device.type == "cuda" else torch.float32


def flops_per_token(model: nn.Module) -> int:
    """6 per trained weight of a linear layer and 4 per frozen one, by their shapes; attention scores are left out.

    Source: Kaplan et al., section 2.1, https://arxiv.org/abs/2001.08361
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = getattr(module, "weight", None)
            trained = isinstance(weight, Tensor) and weight.requires_grad
            total += module.in_features * module.out_features * (FLOPS_TRAINED if trained else FLOPS_FROZEN)
    trained_elsewhere = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" in n)
    return total + FLOPS_TRAINED * trained_elsewhere


def perplexity(loss: float) -> float:
    """e to the loss; infinity where that is beyond floating point."""
    return math.exp(loss) if loss < 700 else math.inf
