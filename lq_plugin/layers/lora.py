"""A frozen layer with a trained low-rank change beside it: W + scale B @ A, of which only A and B are trained.

With DoRA the rows of the sum get a trained length: m (W + scale B @ A) / |W + scale B @ A|, where the norm counts as a
constant in backward.

Sources: LoRA, https://arxiv.org/abs/2106.09685; DoRA, section 4, https://arxiv.org/abs/2402.09353
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin.layers.frozen import FrozenWeight, output_dtype
from lq_plugin.layers.linear import is_conv1d
from lq_plugin.layers.low_rank import down, up


class LoRALayer(nn.Module):
    """What adapted layers have in common. base_layer: the layer as it was. lora_A, lora_B: the trained factors.

    merged: the change is in the weight of base_layer now. enabled: False leaves the change out.
    """

    base_layer: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, r: int, lora_alpha: float, use_rslora: bool, init: bool | str) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        self.base_layer = base_layer
        self.r, self.lora_alpha = r, lora_alpha
        self.scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.init_lora_weights = init
        self.enabled = True
        self.config: Any = None  # the LoRAConfig that add_lora took
        self._kept: dict[str, Tensor] | None = None
        self._merged = False

    @property
    def merged(self) -> bool:
        return self._merged

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base_layer, "bias", None)

    def adapted_weight(self) -> Tensor:
        """The weight of the base with the change in it, float32, in the base's own layout."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, reversible: bool = True) -> None:
        """Puts the change into the weight of the base. A quantised base is quantised anew, which rounds.

        reversible: keeps the weight as it is now, codes and scales, in host memory for `unmerge`.
        ValueError: merged already, or the sum is not finite; nothing is changed then.
        """
        if self._merged:
            raise ValueError("the adapter is merged already")
        weight = self.mergeable_weight()
        tensors = self._weight_tensors()
        kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()} if reversible else None
        self._write(weight)
        self._merged, self._kept = True, kept

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base the weight that it had before `merge`, to the bit; ValueError where it was not kept."""
        if not self._merged:
            raise ValueError("the adapter is not merged")
        if self._kept is None:
            raise ValueError("the adapter was merged with reversible=False: the earlier weight is gone")
        for name, tensor in self._weight_tensors().items():
            tensor.data.copy_(self._kept[name])
        self._merged, self._kept = False, None

    @torch.no_grad()
    def mergeable_weight(self) -> Tensor:
        """The adapted weight in the dtype in which the base takes it; ValueError where it is not finite."""
        weight = self.adapted_weight().to(self._weight_dtype)
        if not torch.isfinite(weight).all():
            raise ValueError("the weight with the adapter in it is not finite: the adapter is broken, or too large")
        return weight

    @property
    def _weight_dtype(self) -> torch.dtype:
        return getattr(self.base_layer, "weight_dtype", self.base_layer.weight.dtype)

    def _weight_tensors(self) -> dict[str, Tensor]:
        """Everything of the base but its bias: the weight, or its codes and scales."""
        own = {**self.base_layer._parameters, **self.base_layer._buffers}
        return {name: tensor for name, tensor in own.items() if tensor is not None and name != "bias"}

    def _write(self, weight: Tensor) -> None:
        if isinstance(self.base_layer, FrozenWeight):
            self.base_layer.requantize(weight)
        else:
            self.base_layer.weight.data.copy_(weight)

    def _passes_through(self) -> bool:
        """Whether the base alone gives the output; RuntimeError for training a merged layer, which would not train."""
        if self._merged and self.training and torch.is_grad_enabled() and self.lora_A.requires_grad:
            raise RuntimeError("the adapter is merged into the weight and would not train: unmerge_lora(model) first")
        return self._merged or not self.enabled

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._merged:
            raise RuntimeError(
                "the adapter is merged: a state_dict would hold it twice. Call unmerge_lora(model) before saving, or "
                "remove_lora(model) for a model without adapters"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, merged={self._merged}"


class LoRALinear(LoRALayer):
    """Beside a linear: nn.Linear, frozen 4-bit and 8-bit layers, linears in a trainable format, transformers' Conv1D.

    x (..., I) -> (..., O) in the dtype of the base's output. lora_A (r, I), lora_B (O, r), lora_magnitude (O,) or None,
    in `dtype`; the products run in the autocast dtype, or without autocast in that of x. base_layer: is frozen.
    lora_dropout: of the input of A, while training; PEFT's DoRA drops inputs of the base too, in a second product with
    the weight. DoRA keeps the output (T, O) for the gradient of the lengths.
    init_lora_weights: see LoRAConfig.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, use_rslora, init_lora_weights)
        if not isinstance(base_layer, nn.Linear) and not is_conv1d(base_layer):
            raise TypeError(f"LoRALinear takes an nn.Linear or transformers' Conv1D, got {type(base_layer).__name__}")
        base_layer.requires_grad_(False)
        self.out_features, self.in_features = linear_shape(base_layer)
        self.lora_dropout = lora_dropout
        options: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        self.lora_magnitude = nn.Parameter(torch.empty(self.out_features, **options)) if use_dora else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B as init_lora_weights says, the lengths of DoRA those of the weight as it then is."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None and not self.lora_magnitude.is_meta:
            self.lora_magnitude.copy_(self._norms())

    def forward(self, x: Tensor) -> Tensor:
        if self._passes_through():
            return self.base_layer(x)
        x, h = down(x, self.lora_A, self.lora_dropout if self.training else 0.0)
        # What a hook has seen of the base may still be looked at later.
        y = up(self.base_layer(x), h, self.lora_B, self.scale, in_place=not self.base_layer._forward_hooks)
        return y if self.lora_magnitude is None else self._with_lengths(y, self.lora_magnitude)

    def _with_lengths(self, y: Tensor, magnitude: Tensor) -> Tensor:
        """y = W' x + bias -> (m / |W'|) W' x + bias."""
        norms = self._norms()
        # A row of zeros has no direction to give a length; the inner `where` keeps its gradient free of NaN.
        factor = torch.where(norms > 0, magnitude / norms.where(norms > 0, 1.0), 1.0).to(y.dtype)
        if self.bias is None:
            return y * factor
        return torch.addcmul((1 - factor) * self.bias.to(y.dtype), y, factor)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """|W + scale B @ A| by row, float32 (O,), from products as thin as A: the sum is never formed."""
        weight = linear_weight(self.base_layer)
        with torch.autocast(weight.device.type, enabled=False):
            wide = torch.promote_types(weight.dtype, torch.float32)
            a, b = self.lora_A.to(weight.dtype), self.lora_B.to(wide)
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
            cross = ((weight @ a.t()).to(wide) * b).sum(1)
            own = ((b @ (a @ a.t()).to(wide)) * b).sum(1)
        return (squares + 2 * self.scale * cross + self.scale**2 * own).clamp(min=0).sqrt()

    def adapted_weight(self) -> Tensor:
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        weight = linear_weight(self.base_layer).to(wide)
        weight = torch.addmm(weight, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale)
        if self.lora_magnitude is not None:
            norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
            weight = torch.where(norms > 0, self.lora_magnitude.to(wide).unsqueeze(1) / norms, 1.0) * weight
        return weight.t() if is_conv1d(self.base_layer) else weight


class LoRAEmbedding(LoRALayer):
    """Beside an embedding (V, D): ids -> base(ids) + scale A.t()[ids] @ B.t(), with lora_A (r, V), lora_B (D, r).

    A starts at zero and B normal, as in PEFT. The output is scaled where the base scales its own (Gemma's embed_scale).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base_layer, r, lora_alpha, use_rslora, init_lora_weights)
        if not isinstance(base_layer, nn.Embedding):
            raise TypeError(f"LoRAEmbedding takes an nn.Embedding, got {type(base_layer).__name__}")
        if base_layer.max_norm is not None or base_layer.sparse:
            raise ValueError("LoRA beside an embedding with max_norm or sparse gradients is not supported")
        if any(True for _ in base_layer.children()):
            raise ValueError(f"a {type(base_layer).__name__} changes its output further, which LoRA would stand behind")
        base_layer.requires_grad_(False)
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        options: dict[str, Any] = {"device": base_layer.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.num_embeddings, **options))
        self.lora_B = nn.Parameter(torch.empty(self.embedding_dim, r, **options))
        self.lora_magnitude = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_B)
        if self.init_lora_weights is False:
            nn.init.normal_(self.lora_A)
        else:
            nn.init.zeros_(self.lora_A)

    def forward(self, input: Tensor) -> Tensor:
        y = self.base_layer(input)
        if self._passes_through():
            return y
        h = F.embedding(input, self.lora_A.t(), self.base_layer.padding_idx).reshape(-1, self.r).to(output_dtype(y))
        scale = getattr(self.base_layer, "embed_scale", None)
        h = h if scale is None else h * scale
        return up(y, h.to(output_dtype(y)), self.lora_B, self.scale, in_place=not self.base_layer._forward_hooks)

    def adapted_weight(self) -> Tensor:
        base = self.base_layer
        weight = base.dequantize() if isinstance(base, FrozenWeight) else base.weight
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return torch.addmm(weight.to(wide), self.lora_A.t().to(wide), self.lora_B.t().to(wide), alpha=self.scale)


def linear_shape(linear: Any) -> tuple[int, int]:
    """(O, I) of a linear, also a quantised one."""
    if is_conv1d(linear):
        in_features, out_features = linear.weight.shape
        return out_features, in_features
    return linear.out_features, linear.in_features


def linear_weight(linear: Any) -> Tensor:
    """The weight of a linear as (O, I), dequantised where it is quantised."""
    if isinstance(linear, FrozenWeight):
        return linear.dequantize()
    weight: Tensor = linear.weight
    if not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(
            f"a {type(linear).__name__} with a weight of {weight.dtype} {tuple(weight.shape)} was quantised by another "
            "library: DoRA and merging need its values. Quantise the float model with lq_plugin.convert"
        )
    return weight.detach().t() if is_conv1d(linear) else weight.detach()
