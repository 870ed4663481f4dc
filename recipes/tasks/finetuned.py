"""A model for evaluation, export or writing: a folder or hub name, with or without an adapter on it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lq_plugin.recipes.reports.adapter import base_of
from lq_plugin.recipes.tasks.causal_lm import dtype_on
from lq_plugin.recipes.tasks.encoding import Encoder
from lq_plugin.recipes.tasks.tokenizer import tokenizer_of

AS_TRAINED = "as_trained"


@dataclass(frozen=True)
class Finetuned:
    """source: None is what the adapter names. adapter: a folder that lq-finetune or PEFT wrote, or None.

    linear: the format of the frozen base, None for 16 bits, "as_trained": the one that the adapter was trained beside,
    or 16 bits without an adapter. dtype: of what is not quantised. device: auto is the GPU if there is one.
    template: what `Encoder` takes.
    """

    source: str | None
    adapter: str | None = None
    linear: str | None = AS_TRAINED
    skip: Iterable[str] = ()
    dtype: str = "auto"
    device: str = "auto"
    template: str = "chat"

    def load(self) -> tuple[nn.Module, Encoder]:
        """The model in eval mode, and its encoder; errors say what is missing."""
        from lq_plugin.adapters import load_adapter
        from lq_plugin.loading import load_pretrained

        base = base_of(self.adapter) if self.adapter else {}
        source = self._source(base)
        linear = base.get("linear") if self.linear == AS_TRAINED else self.linear
        device = self.target()
        dtype = dtype_on(device, self.dtype)
        skip = tuple(self.skip) or tuple(base.get("skip", ()))
        model = load_pretrained(source, linear, device=device, dtype=dtype, skip=skip if linear else ())
        if self.adapter:
            # Beside another format the base is the same model, and its fingerprint another.
            load_adapter(model, self.adapter, check_fingerprint=linear == base.get("linear"))
        return model.eval(), Encoder(tokenizer_of(self._words(source)), self.template)

    def target(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _source(self, base: Any) -> str:
        source = self.source or base.get("source")
        if not source:
            raise ValueError("no model: pass source=<folder or hub name>, or adapter=<folder>, which names its base")
        return str(source)

    def _words(self, source: str) -> str:
        """Where the tokenizer is: beside the adapter, if one was saved there."""
        beside = self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").exists()
        return str(self.adapter) if beside else source
