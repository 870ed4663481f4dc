"""A frozen format keeps the weight of a linear layer in few bits; the weight is read back, and never trained.

Gradients pass to the input and the bias. What trains a model with frozen layers is beside them: LoRA, norms,
embeddings.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class FrozenFormat:
    """What the frozen formats have in common. bits: width of a weight.

    layer, experts: the modules that hold the format, and kept_as: their rows. The layers set them, for they know the
    formats and not the other way round.
    """

    bits: ClassVar[int]
    layer: ClassVar[Any] = None
    experts: ClassVar[Any] = None
    kept_as: ClassVar[Any] = None

    @property
    def name(self) -> str:
        raise NotImplementedError

    def freeze(self, linear: nn.Module, device: torch.device | str | None = None) -> nn.Module:
        """A FrozenLinear for `linear`, an nn.Linear or transformers' Conv1D, or FrozenExperts for fused experts.

        `linear` itself stays what it is.

        The weight is moved to `device` (None: left where it is) and quantised there. The bias is the same parameter
        unless it moves; forward hooks come along. A linear on the meta device gives a layer there. ValueError: a weight
        that is quantised already.
        """
        if self.layer is None:
            raise RuntimeError(f"the layers that hold {self.name} are not loaded: import lq_plugin.layers first")
        holder = self.experts if hasattr(linear, "num_experts") else self.layer
        return holder.frozen_from(linear, self, device)

    def rows(self, shape: tuple[int, ...], storage: torch.dtype = torch.uint8) -> Any:
        """How a tensor of `shape` is kept in this format; storage: the dtype under which files show 4-bit codes."""
        return self.kept_as(shape, self, storage)
