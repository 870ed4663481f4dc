"""Cross entropy of a language model's output layer without its logits: a chunk of tokens at a time.

    logits = scale * hidden @ weight.t() + bias;  softcap: c * tanh(logits / c)
    loss_t = -(1 - e) * log p_t[target] - e / V * sum_v log p_t[v],   p_t = softmax(logits_t)
    d loss_t / d logits_t = p_t - (1 - e) * onehot - e / V, times 1 - (logits / c)^2 beside a softcap

Logits of 8192 tokens and a vocabulary of 128k take 4.2 GB in float32, and again for their gradient. Here those of one
chunk exist at a time, and the gradients of hidden and weight are computed beside the loss, while they are there: three
matrix products in all, as in the plain computation. With reduction="none" the upstream gradient of each token is
needed first, and the backward pass computes the logits again.

torch.nn.functional.linear_cross_entropy (torch 2.13) has no softcap, and torch 2.11 does not have it; Liger's runs on
GPUs only. Sources of the idea: https://arxiv.org/abs/2410.10989 (section 3.2), https://arxiv.org/abs/2411.09009
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 1024  # tokens: enough for a matrix product at full speed; 0.5 GB of logits at 128k words
IGNORE_INDEX = -100  # torch's and transformers' mark of a token without a loss
REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
    reduction: str = "mean",
) -> Tensor:
    """hidden (T, H), weight (V, H), target (T,) int64, bias (V,) or None -> () float32, or (T,) for reduction="none".

    Equal to F.cross_entropy(logits.float(), target, ...) on logits that keep their float32 accumulator; on AMD GPUs
    they pass through 16 bits, as a 16-bit linear's do. float64 stays float64. Inside autocast hidden, weight and bias
    are cast first, as F.linear's arguments are. Targets are in [0, V) or `ignore_index`, which gives loss and gradient
    0; the mean is over the others, NaN if there are none (as torch). A frozen weight gets no gradient and takes no
    memory for one, a trained one accumulates in float32. To be differentiated once.

    chunk: tokens whose logits exist at a time, half as many beside a softcap: at most chunk * V floats, and in 16 bits
    as many again. Source: softcap, Gemma 2, section 2, https://arxiv.org/abs/2408.00118
    """
    _check_shapes(hidden, weight, target, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if chunk < 1 or not 0.0 <= label_smoothing <= 1.0 or (softcap is not None and softcap <= 0):
        raise ValueError(
            "chunk must be at least 1, label_smoothing in [0, 1] and softcap positive or None, got "
            f"chunk={chunk}, label_smoothing={label_smoothing}, softcap={softcap}"
        )
    hidden, weight, bias = _autocast(hidden, weight, bias)
    if hidden.dtype not in _DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: one floating-point dtype is needed outside of "
            "autocast; cast one of them, or dequantise a quantised output layer"
        )
    options = LossOptions(ignore_index, label_smoothing, softcap, scale, chunk)
    if reduction == "none":
        return _EachToken.apply(hidden, weight, bias, target, options)
    total = _Total.apply(hidden, weight, bias, target, options)
    return total if reduction == "sum" else total / (target != ignore_index).sum()


@dataclass(frozen=True)
class LossOptions:
    """What `linear_cross_entropy` takes beside its tensors."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    scale: float
    chunk: int

    def chunks(self, tokens: int) -> list[slice]:
        """Beside a softcap half as many tokens: its tanh is kept as well."""
        step = self.chunk if self.softcap is None else max(1, self.chunk // 2)
        return [slice(begin, begin + step) for begin in range(0, tokens, step)]

    def arguments(self) -> tuple[int, float, float | None, float, int]:
        return self.ignore_index, self.label_smoothing, self.softcap, self.scale, self.chunk


class _Total(torch.autograd.Function):
    """The sum over tokens; gradients are those of the sum, kept in float32 until the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
    ) -> Tensor:
        wanted = list(ctx.needs_input_grad[:3])
        losses, *gradients = losses_and_gradients(hidden, weight, bias, target, None, *options.arguments(), wanted)
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        gradients = [
            _scaled(gradient, grad_output, dtype) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *gradients, None, None


class _EachToken(torch.autograd.Function):
    """The loss of each token; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
    ) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, target)
        return losses_and_gradients(hidden, weight, bias, target, None, *options.arguments(), [False] * 3)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        hidden, weight, bias, target = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        arguments = (hidden, weight, bias, target, grad_output, *ctx.options.arguments())
        gradients = losses_and_gradients(*arguments, wanted)[1:]
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        cast = [g.to(dtype) if n else None for g, dtype, n in zip(gradients, dtypes, wanted, strict=True)]
        return *cast, None, None


@torch.library.custom_op("lq_plugin::linear_cross_entropy", mutates_args=())
def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (T,) and the gradients of hidden, weight and bias that are wanted, empty otherwise; all float32 (or 64).

    upstream: (T,), what the loss of each token counts in the gradients, or None for 1. One op, so that torch.compile
    neither unrolls the chunks nor keeps more than one of them.
    """
    losses, *gradients = _empty_results(hidden, weight, wanted)
    options = LossOptions(ignore_index, label_smoothing, softcap, scale, chunk)
    for rows in options.chunks(len(hidden)):
        grad_logits = _loss_of_chunk(hidden[rows], weight, bias, target[rows], options, losses[rows])
        if any(wanted):
            factor = (target[rows] != ignore_index).to(losses.dtype)
            factor = factor if upstream is None else factor * upstream[rows]
            _add_gradients(grad_logits, hidden[rows], weight, (factor, scale), rows, gradients)
        del grad_logits  # before those of the next chunk are made
    return losses, *gradients  # type: ignore[return-value]


@losses_and_gradients.register_fake
def _losses_and_gradients_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, upstream: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float | None, scale: float, chunk: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_results(hidden, weight, wanted)


def _empty_results(hidden: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if wanted[1] else 0, dtype=dtype)
    grad_bias = weight.new_zeros(len(weight) if wanted[2] else 0, dtype=dtype)
    return losses, grad_hidden, grad_weight, grad_bias


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _loss_of_chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions, losses: Tensor
) -> Tensor:
    """Writes the losses (C,) of a chunk and returns the gradient of each by its logits (C, V), ignored ones too.

    All in the storage of the logits; a 16-bit gradient has its own, and beside a softcap its tanh.
    """
    logits = _logits(hidden, weight, bias, options.scale)
    tanh = None
    if options.softcap is not None:
        tanh = logits.div_(options.softcap).tanh_()
        logits = tanh * options.softcap
    counted = target != options.ignore_index
    index = target.where(counted, 0)[:, None]
    logits -= logits.amax(dim=1, keepdim=True)
    picked = logits.gather(1, index)[:, 0]
    mean = logits.mean(dim=1) if options.label_smoothing else picked
    total = logits.exp_().sum(dim=1)
    losses.copy_((total.log() - picked.lerp(mean, options.label_smoothing)).where(counted, 0.0))
    exact = options.label_smoothing > 0 or tanh is not None or _widens(hidden)
    probabilities = logits if exact else _in_dtype(logits, hidden.dtype)
    torch.mul(logits, total.reciprocal()[:, None], out=probabilities)
    everywhere = options.label_smoothing / len(weight)
    if everywhere:
        probabilities -= everywhere
    at_target = picked.exp() / total - (1.0 - options.label_smoothing) - everywhere
    probabilities.scatter_(1, index, at_target[:, None].to(probabilities.dtype))
    if tanh is not None:
        probabilities *= tanh.square_().neg_().add_(1.0)
    return probabilities


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Itself, or a new tensor to write its values in another dtype."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def _add_gradients(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    factors: tuple[Tensor, float],
    rows: slice,
    gradients: list[Tensor],
) -> None:
    """grad_logits (C, V) of a chunk -> its rows of grad_hidden, and its share of grad_weight and grad_bias.

    factors: (C,) what each token counts, and the scale of the logits. They go to tensors of H columns, not V.
    """
    grad_hidden, grad_weight, grad_bias = gradients
    counts, scale = factors
    if grad_bias.numel():
        grad_bias += (grad_logits * counts[:, None]).sum(dim=0)
    counts = (counts * scale)[:, None]
    if grad_hidden.numel():
        _add_grad_hidden(grad_hidden[rows], grad_logits, hidden, weight)
        grad_hidden[rows] *= counts
    if grad_weight.numel():
        _add_grad_weight(grad_weight, grad_logits, hidden, counts)


def _add_grad_hidden(out: Tensor, grad_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out (C, H), zeros, += grad_logits @ weight."""
    if _keeps_accumulator(hidden):
        torch.mm(grad_logits.to(hidden.dtype), weight, out_dtype=torch.float32, out=out)
    elif _widens(hidden):
        for words in _slices_of(weight, len(hidden)):
            out.addmm_(grad_logits[:, words], weight[words].float())
    else:
        out += grad_logits.to(hidden.dtype) @ weight


def _add_grad_weight(out: Tensor, grad_logits: Tensor, hidden: Tensor, counts: Tensor) -> None:
    """out (V, H) += grad_logits.t() @ (counts * hidden)."""
    counted = (hidden * counts).to(hidden.dtype)
    if _keeps_accumulator(hidden):
        narrow = grad_logits.to(hidden.dtype)
        torch.addmm(out, narrow.t(), counted, out_dtype=torch.float32, out=out)
    elif _widens(hidden):
        out.addmm_(grad_logits.t(), (hidden * counts).float())
    elif hidden.dtype == out.dtype:
        out.addmm_(grad_logits.t(), counted)
    else:
        out += grad_logits.to(hidden.dtype).t() @ counted


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * hidden @ weight.t() + bias, (C, V), in the accumulator's dtype."""
    dtype = accumulator(hidden.dtype)
    if _keeps_accumulator(hidden):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    elif _widens(hidden):
        wide = hidden.float()
        logits = hidden.new_empty(len(hidden), len(weight), dtype=dtype)
        for words in _slices_of(weight, len(hidden)):
            torch.mm(wide, weight[words].float().t(), out=logits[:, words])
    else:
        logits = (hidden @ weight.t()).to(dtype)
    if scale != 1.0:
        logits *= scale
    return logits if bias is None else logits.add_(bias)


def _keeps_accumulator(x: Tensor) -> bool:
    """Whether the device has a 16-bit product that returns its float32 accumulator; only NVIDIA's has."""
    return x.is_cuda and torch.version.hip is None and x.element_size() == 2


def _widens(x: Tensor) -> bool:
    """Whether 16-bit products are computed in float32: on a CPU, by slices of the vocabulary."""
    return not x.is_cuda and x.element_size() == 2


def _slices_of(weight: Tensor, tokens: int) -> list[slice]:
    """Slices of the vocabulary whose weights take in float32 an eighth of what the logits of the tokens take."""
    words, width = weight.shape
    step = max(1, words * tokens // (8 * max(1, width)))
    return [slice(begin, begin + step) for begin in range(0, words, step)]


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once to dtype."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype of the autocast that is on, if one is and they are not float64."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or target.shape != hidden.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            "expected hidden (T, H), weight (V, H), target (T,) and bias (V,) or None, got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(target.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}; flatten batch and sequence first"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target holds word numbers in int64, got {target.dtype}")


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy has no gradient of its gradient, and create_graph=True asks for one: use "
            "F.cross_entropy on whole logits"
        )
