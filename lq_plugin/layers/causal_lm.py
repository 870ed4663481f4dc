"""The loss of a transformers causal language model without its logits, and without a change to its code.

The model's decoder gives the last hidden states; its output layer and what its configuration says about the logits
(a softcap, a scale) go to `linear_cross_entropy`. Whether that is all that the model does to its logits is asked once
by `check_output_layer`, beside the model's own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.layers.chunked_cross_entropy import CHUNK, linear_cross_entropy

_SOFTCAP = "final_logit_softcapping"  # Gemma 2
_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISOR = "logits_scaling"  # Granite
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_PROBE_TOKENS = 8
# Of the largest logit: 16-bit logits carry 2^-8, and the order of a sum changes little more.
_SAME_LOGITS = 2.0**-5


@dataclass(frozen=True)
class OutputLayer:
    """Logits are softcapped(scale * hidden @ weight.t() + bias); see linear_cross_entropy."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


def causal_lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk: int = CHUNK,
    reduction: str = "mean",
    **inputs: Any,
) -> Tensor:
    """input_ids and labels (B, T) int64 -> the loss of predicting labels[:, t] from the tokens before t, () float32.

    model: a transformers causal language model, also quantised, with LoRA or wrapped by PEFT. labels are those that
    transformers takes: input_ids with -100 where no loss is wanted; the first token of a row is never predicted.
    inputs: more arguments of the model, such as position_ids or attention_mask. reduction="none" gives (B, T - 1).
    A mixture of experts whose configuration asks for it (output_router_logits) gets its balancing loss added.

    ValueError or TypeError: no decoder and linear output layer to be found; use model(..., labels=labels).loss.
    """
    model = _transformers_model(model)
    output = output_layer(model)
    decoded = model.get_decoder()(input_ids=input_ids, use_cache=False, **inputs)  # type: ignore[operator]
    hidden = decoded.last_hidden_state[:, :-1].flatten(0, 1)
    target = labels[:, 1:].flatten()
    loss = linear_cross_entropy(
        hidden,
        output.weight,
        target,
        output.bias,
        softcap=output.softcap,
        scale=output.scale,
        label_smoothing=label_smoothing,
        chunk=chunk,
        reduction=reduction,
    )
    if reduction == "none":
        return loss.view(labels.shape[0], -1)
    return loss + _balancing_loss(model, decoded, inputs)


def output_layer(model: nn.Module) -> OutputLayer:
    """What stands between the last hidden states and the logits, by the model's modules and configuration."""
    model = _transformers_model(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"the output layer of {type(model).__name__} is a {type(head).__name__}, a linear layer with a weight in "
            "floating point is needed: leave it out of quantisation and LoRA, or compute the loss from whole logits"
        )
    if weight.shape[1] != head.in_features:
        raise TypeError(f"the output layer holds its weight packed, as {tuple(weight.shape)}: leave it in 16 bits")
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = 1.0 / (getattr(config, _DIVISOR, None) or 1.0)
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    return OutputLayer(weight, head.bias, scale, getattr(config, _SOFTCAP, None))


@torch.no_grad()
def check_output_layer(model: nn.Module) -> None:
    """Raises ValueError unless logits computed as `causal_lm_loss` does are the model's own, on a few tokens."""
    inner = _transformers_model(model)
    output = output_layer(inner)
    tokens = _probe(inner, output.weight.device)
    training = inner.training
    inner.eval()
    theirs = inner(input_ids=tokens, use_cache=False).logits.float()
    hidden = inner.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[operator]
    inner.train(training)
    bias = 0.0 if output.bias is None else output.bias.float()
    logits = output.scale * nn.functional.linear(hidden.to(output.weight.dtype), output.weight).float() + bias
    if output.softcap is not None:
        logits = output.softcap * torch.tanh(logits / output.softcap)
    difference = (logits - theirs).abs().max() / theirs.abs().max()
    if not difference <= _SAME_LOGITS:
        raise ValueError(
            f"{type(inner).__name__} does more to its logits than its output layer, a scale and a softcap (they differ "
            f"by {float(difference):.1%} of the largest): compute the loss from whole logits"
        )


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether position_ids that begin again at 0 keep the tokens after that from seeing those before.

    transformers makes a block-diagonal mask of such position_ids when there is no attention_mask; models that ignore
    position_ids, or that carry a state along, do not. Asked by changing one of two documents in a row: the other one
    must feel it far less than it does without the mask.
    """
    model = _transformers_model(model)
    tokens = _probe(model, next(model.parameters()).device)
    changed = tokens.clone()
    half = _PROBE_TOKENS // 2
    changed[:, :half] = tokens[:, :half].flip(1) + 1
    positions = torch.arange(_PROBE_TOKENS, device=tokens.device)[None]
    training = model.training
    model.eval()

    def felt(position_ids: Tensor) -> float:
        decode = model.get_decoder()  # type: ignore[operator]
        first, second = (
            decode(input_ids=x, position_ids=position_ids, use_cache=False).last_hidden_state[:, half:].float()
            for x in (tokens, changed)
        )
        return float((first - second).abs().max())

    with_mask, without = felt(positions % half), felt(positions)
    model.train(training)
    return with_mask <= without / 10


def _probe(model: nn.Module, device: torch.device) -> Tensor:
    """(1, 8) different tokens, also after one is added to each."""
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return (torch.arange(3, 3 + _PROBE_TOKENS, device=device) % (words - 1))[None]


def _balancing_loss(model: nn.Module, decoded: Any, inputs: dict[str, Any]) -> Tensor | float:
    """What transformers adds for a mixture of experts; 0 unless the configuration asks for it."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    logits = getattr(decoded, "router_logits", None)
    if not getattr(config, "output_router_logits", False) or logits is None:
        return 0.0
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = next(
        getattr(config, name)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
        if hasattr(config, name)
    )
    loss = load_balancing_loss_func(logits, experts, config.num_experts_per_tok, inputs.get("attention_mask"))
    return config.router_aux_loss_coef * loss


def _transformers_model(model: nn.Module) -> nn.Module:
    """Below PEFT's wrappers and torch.compile's."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not all(hasattr(model, name) for name in ("get_decoder", "get_output_embeddings", "config")):
        raise TypeError(f"expected a transformers causal language model, got a {type(model).__name__}")
    return model
