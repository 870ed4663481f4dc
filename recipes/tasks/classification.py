"""Sequence classification: any model of transformers with a head, frozen in few bits, and labelled text for it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import AdamW

from lq_plugin.recipes.tasks.causal_lm import DTYPES, dtype_on
from lq_plugin.recipes.tasks.records import read_records
from lq_plugin.recipes.tasks.scheduled import MakeOptimizer, ScheduledModule
from lq_plugin.recipes.tasks.text_data import hold_out
from lq_plugin.recipes.tasks.tokenizer import tokenizer_of
from lq_plugin.recipes.tasks.windows import Batch, TrainingBatches, ValidationBatches

HEADS = ("score", "classifier", "classification_head")  # transformers' names


class LabelledText(LightningDataModule):
    """source: a .jsonl, .json, .csv or .parquet file, a folder of such, or a data set of the Hugging Face hub.

    labels: their names, in the order of the classes; a label in the data is a name, or the number of a class.
    context: tokens of a text, the rest is cut off. validation: another source, or None: a share of the samples.
    """

    def __init__(
        self,
        source: str,
        *,
        tokenizer: str,
        labels: Sequence[str],
        text_column: str = "text",
        label_column: str = "label",
        context: int = 256,
        batch_size: int = 16,
        split: str = "train",
        validation: str | None = None,
        validation_split: str = "train",
        validation_share: float = 0.1,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(set(labels)) < 2 or len(set(labels)) != len(labels):
            raise ValueError(f"data.labels names at least two different classes, got {list(labels)}")
        self.batch_size = batch_size
        self.seed = seed
        self._words = tokenizer_of(tokenizer)
        self._columns = (text_column, label_column)
        self._numbers = {str(name): number for number, name in enumerate(labels)}
        self._context = context
        training = self._read(source, split)[:limit]
        if validation is None:
            training, held_out = hold_out(training, validation_share)
        else:
            held_out = self._read(validation, validation_split)
        if len(training) < batch_size:
            raise ValueError(f"{len(training)} samples are fewer than data.batch_size={batch_size}: lower it")
        self._training = self._encoded(training)
        self._validation = self._encoded(held_out)

    def train_dataloader(self) -> TrainingBatches:
        trainer = self.trainer
        assert trainer is not None, "Lightning attaches the Trainer before it asks for data"
        done = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        return TrainingBatches(
            self._training, self.batch_size, self.seed, done, trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> ValidationBatches | list:
        trainer = self.trainer
        assert trainer is not None, "Lightning attaches the Trainer before it asks for data"
        number = len(self._validation)
        if not number:
            return []
        return ValidationBatches(self._validation, number, self.batch_size, trainer.global_rank, trainer.world_size)

    def _read(self, source: str, split: str) -> list[tuple[str, int]]:
        text, label = self._columns
        pairs = []
        for where, record in read_records(source, split):
            if text not in record or label not in record:
                raise ValueError(
                    f"{where} has the columns {', '.join(map(str, record))}; expected {text!r} and {label!r}: name "
                    "others as data.text_column and data.label_column"
                )
            pairs.append((str(record[text]), self._number(record[label], where)))
        return pairs

    def _number(self, label: Any, where: str) -> int:
        if str(label) in self._numbers:
            return self._numbers[str(label)]
        if str(label).isdigit() and int(label) < len(self._numbers):
            return int(label)
        raise ValueError(f"{where} has the label {label!r}; data.labels are {', '.join(self._numbers)}")

    def _encoded(self, pairs: list[tuple[str, int]]) -> "LabelledTokens":
        texts = [text for text, _ in pairs]
        tokens = self._words(texts, truncation=True, max_length=self._context)["input_ids"] if texts else []
        pad = next(t for t in (self._words.pad_token_id, self._words.eos_token_id, 0) if t is not None)
        return LabelledTokens(tokens, [number for _, number in pairs], pad)


@dataclass(frozen=True)
class LabelledTokens:
    """Texts as token numbers with the number of their class."""

    tokens: list[list[int]]
    labels: list[int]
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, numbers: Tensor) -> Batch:
        """Sample numbers (B,) -> input_ids and attention_mask (B, T) int64, padded on the right, and labels (B,)."""
        chosen = [self.tokens[number] for number in numbers.tolist()]
        length = max(1, *map(len, chosen))
        inputs = [tokens + [self.pad] * (length - len(tokens)) for tokens in chosen]
        mask = [[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in chosen]
        labels = [self.labels[number] for number in numbers.tolist()]
        return {
            "input_ids": torch.tensor(inputs),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }


class Classifier(ScheduledModule):
    """Logs train/loss, val/loss and val/accuracy. The head is trained whole, the rest as in CausalLM.

    source: a folder or hub name; a base without a head gets a new one, as transformers gives it.
    """

    def __init__(
        self,
        source: str,
        *,
        labels: Sequence[str],
        linear: Any = "nf4",
        lora: Any = None,
        skip: Iterable[str] = (),
        dtype: str = "auto",
        warmup_steps: int = 0,
        optimizer: MakeOptimizer = AdamW,
    ) -> None:
        super().__init__(warmup_steps, optimizer)
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype is auto, {', '.join(DTYPES)}, got {dtype!r}")
        self.save_hyperparameters({"source": source, "labels": [str(name) for name in labels]}, logger=False)
        self.source = source
        self.labels = [str(name) for name in labels]
        self._linear, self._lora, self._skip, self._dtype_name = linear, lora, tuple(skip), dtype
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        from transformers import AutoModelForSequenceClassification

        from lq_plugin import convert
        from lq_plugin.lora_config import LoRAConfig
        from lq_plugin.model_folder import model_folder

        device = self.trainer.strategy.root_device
        words = tokenizer_of(self.source)
        pad = words.pad_token_id if words.pad_token_id is not None else words.eos_token_id
        self.model = AutoModelForSequenceClassification.from_pretrained(
            str(model_folder(self.source)),
            id2label=dict(enumerate(self.labels)),
            label2id={name: number for number, name in enumerate(self.labels)},
            dtype=dtype_on(device, self._dtype_name),
            pad_token_id=pad,
        )
        self.model.train()
        head = head_of(self.model)
        self.model.get_submodule(head).float()
        lora = None if self._lora is None else replace(LoRAConfig.of(self._lora), modules_to_save=(head,))
        self.model.to(device)
        if self._linear is not None or lora is not None:
            _say(str(convert(self.model, self._linear, skip=(head, *self._skip), lora=lora)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        outputs = self.model(**batch)
        right = (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
        number = len(batch["labels"])
        self.log("val/loss", outputs.loss, prog_bar=True, sync_dist=True, batch_size=number)
        self.log("val/accuracy", right, prog_bar=True, sync_dist=True, batch_size=number)

    @property
    def has_adapter(self) -> bool:
        return self._lora is not None

    def save_adapter(self, folder: Path) -> None:
        """The LoRA weights and the head as PEFT keeps them, with the tokenizer beside them."""
        from lq_plugin.adapters import save_adapter

        save_adapter(self.model, folder, base_model=self.source)
        tokenizer_of(self.source).save_pretrained(str(folder))

    def base(self) -> dict[str, Any]:
        linear = self._linear if isinstance(self._linear, str) else None
        return {"source": str(self.source), "linear": linear, "skip": list(self._skip), "labels": self.labels}


def head_of(model: Any) -> str:
    """The name of the part that turns hidden states into classes."""
    for name in HEADS:
        if isinstance(getattr(model, name, None), torch.nn.Module):
            return name
    raise ValueError(f"{type(model).__name__} has none of the heads {', '.join(HEADS)} to train")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
