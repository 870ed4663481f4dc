"""Embeddings under bitsandbytes' names: frozen in few bits, or trained with a start and a norm that keep it stable.

A frozen embedding reads the rows of its tokens and no others. Its state_dict is that of the linear layer of the same
format, so that it can be saved and loaded, which bitsandbytes' cannot.

StableEmbedding: 8-bit Optimizers via Block-wise Quantization, section 2.3, https://arxiv.org/abs/2110.02861
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin.formats.four_bit import four_bit_format
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.llm_int8 import LLMInt8
from lq_plugin.layers.frozen import FrozenWeight


class FrozenEmbedding(FrozenWeight, nn.Embedding):  # type: ignore[misc]  # `weight` is a parameter there too
    """ids of any shape -> (..., D) from a table (N, D) that is quantised and frozen.

    The output has the dtype of the construction; `.half()` and its kin change it, as they do for nn.Embedding. A new
    embedding has the random table of nn.Embedding, on the meta device none until `requantize` or `load_state_dict`.
    """

    like: Tensor

    def __init__(
        self,
        format: FrozenFormat,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format = format
        self.rows = format.rows((num_embeddings, embedding_dim), storage)
        self.requantize(torch.empty(self.rows.shape, device="meta", dtype=dtype))
        # Empty: casts of the module reach it, and it says what to return.
        self.register_buffer("like", torch.empty(0, device="meta", dtype=dtype), persistent=False)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @classmethod
    def frozen_from(cls, embedding: nn.Embedding, format: FrozenFormat) -> "FrozenEmbedding":
        """The embedding with its table quantised where it is; ValueError: max_norm, which writes to the table."""
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} changes rows as they are read, and a frozen table is not")
        table, (count, dim) = embedding.weight.detach(), embedding.weight.shape
        padding = embedding.padding_idx
        frozen = FrozenEmbedding(format, count, dim, padding_idx=padding, device="meta", dtype=table.dtype)
        frozen.requantize(table)
        frozen.like = frozen.like.new_empty(0, device=table.device)
        return frozen.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.rows.select(self.code_tensors(), input.reshape(-1), self.like.dtype)
        return rows.view(*input.shape, self.embedding_dim)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return
        table = torch.empty(self.rows.shape, device=self.weight.device, dtype=self.weight_dtype).normal_()
        if self.padding_idx is not None:
            table[self.padding_idx] = 0
        self.requantize(table)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


class Embedding4bit(FrozenEmbedding):
    """FrozenEmbedding in NF4 or FP4; quant_storage: see Linear4bit."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(
            four_bit_format(quant_type, block_size),
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            storage=quant_storage,
            device=device,
            dtype=dtype,
        )


class EmbeddingNF4(Embedding4bit):
    """Embedding4bit in NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device, block_size)


class EmbeddingFP4(Embedding4bit):
    """Embedding4bit in FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        block_size: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device, block_size)


class Embedding8bit(FrozenEmbedding):
    """FrozenEmbedding in int8, a scale for each row."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(
            LLMInt8(0.0), num_embeddings, embedding_dim, padding_idx=padding_idx, device=device, dtype=dtype
        )


class Embedding(nn.Embedding):
    """nn.Embedding that starts from Xavier's uniform distribution; our 8-bit optimizers keep its state in 32 bits."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """Embedding with a LayerNorm behind it, computed in float32; the output has the dtype of the table."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, device=device, dtype=dtype, **kwargs)  # type: ignore[misc]
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        rows, norm = super().forward(input).float(), self.norm
        normed = F.layer_norm(rows, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        return normed.to(self.weight.dtype)
