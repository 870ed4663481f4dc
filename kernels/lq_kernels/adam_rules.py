"""Adam and those that grew out of it: AdamW, StableAdamW, AdEMAMix and LAMB.

    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  m^ = m / (1 - beta1^t),  v^ = v / (1 - beta2^t)

    Adam      g <- g + wd p before that;      p <- p - lr m^ / (sqrt(v^) + eps)
    AdamW     p <- p (1 - lr wd) before that; p <- p - lr m^ / (sqrt(v^) + eps)
    stable    either, with lr / max(1, RMS), RMS^2 = mean(g^2 / max(v^, eps^2)) over the tensor
    AdEMAMix  s <- beta3 s + (1 - beta3) g;   p <- p (1 - lr wd) - lr (m^ + alpha s) / (sqrt(v^) + eps)
    LAMB      u = m^ / (sqrt(v^) + eps) + wd p;  p <- p - lr ||p|| / ||u|| u

The weight moves by the new moments before they are quantised. Sources: https://arxiv.org/abs/1412.6980, 1711.05101,
2304.13013 (algorithm 2), 2409.03137, 1904.00962 (algorithm 2, phi the identity; trust 1 where a norm is zero).
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lq_kernels._triton import tl, triton
from lq_kernels.approximate import reciprocal, square_root
from lq_kernels.optimizer_rules import Rule, RuleKernels, float32, norm, norm_ratio, root_ratio

# Numbers of a tensor, the same for all four; AdEMAMix has three more, Adam has two.
_DECAY, _BETA1, _REST1, _BETA2, _REST2, _LR, _MEAN, _ROOT, _EPS = map(tl.constexpr, range(9))
_BETA3, _REST3, _ALPHA = map(tl.constexpr, range(9, 12))
# Adam's _ROOT and _EPS divided by lr / (1 - beta1^t): the reciprocal is the step of a unit m.
_STEP_ROOT, _STEP_EPS = map(tl.constexpr, range(9, 11))
_SMALLEST_RATE, _LARGEST_NUMBER = 1e-300, 3.0e38  # what a learning rate of 0 divides stays finite
_SMALLEST, _LARGEST = tl.constexpr(_SMALLEST_RATE), tl.constexpr(_LARGEST_NUMBER)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@triton.jit
def _bias(log_beta, step):
    """1 - beta^step; in float64, since float32 loses four digits where beta^step is close to 1."""
    return 1.0 - tl.exp(step * log_beta)


@triton.jit
def _moment_numbers(hyper_ptr, numbers_ptr, step):
    """Hyper-parameters 0 .. 5: weight decay, eps, the betas and their logarithms."""
    for i in tl.static_range(2):
        beta = tl.load(hyper_ptr + 2 + i)
        tl.store(numbers_ptr + _BETA1 + 2 * i, beta)
        tl.store(numbers_ptr + _REST1 + 2 * i, 1.0 - beta)
    tl.store(numbers_ptr + _MEAN, 1.0 / _bias(tl.load(hyper_ptr + 4), step))
    tl.store(numbers_ptr + _ROOT, 1.0 / tl.sqrt(_bias(tl.load(hyper_ptr + 5), step)))
    tl.store(numbers_ptr + _EPS, tl.load(hyper_ptr + 1))


@triton.jit
def _adam_numbers(hyper_ptr, numbers_ptr, lr, step):
    _moment_numbers(hyper_ptr, numbers_ptr, step)
    tl.store(numbers_ptr + _LR, lr)
    tl.store(numbers_ptr + _DECAY, tl.load(hyper_ptr))


@triton.jit
def _adam_steps(hyper_ptr, numbers_ptr, lr, step):
    _adam_numbers(hyper_ptr, numbers_ptr, lr, step)
    scale = _bias(tl.load(hyper_ptr + 4), step) / tl.maximum(lr, _SMALLEST)
    root = scale / tl.sqrt(_bias(tl.load(hyper_ptr + 5), step))
    tl.store(numbers_ptr + _STEP_ROOT, tl.minimum(root, _LARGEST))
    tl.store(numbers_ptr + _STEP_EPS, tl.minimum(scale * tl.load(hyper_ptr + 1), _LARGEST))


@triton.jit
def _new_moments(g, m, v, numbers_ptr):
    return m + tl.load(numbers_ptr + _REST1) * g, v + tl.load(numbers_ptr + _REST2) * g * g


@triton.jit
def _inverse_root(v, numbers_ptr, PTX: tl.constexpr):
    """1 / (sqrt(v^) + eps)."""
    return reciprocal(square_root(v, PTX) * tl.load(numbers_ptr + _ROOT) + tl.load(numbers_ptr + _EPS), PTX)


@triton.jit
def _adam_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    decay = tl.load(numbers_ptr + _DECAY)
    if VARIANT == "decoupled":
        p *= 1.0 - (tl.load(numbers_ptr + _LR) * trust) * decay
    else:
        g += decay * p
    m, v = _new_moments(g, m, v, numbers_ptr)
    root = square_root(v, PTX) * tl.load(numbers_ptr + _STEP_ROOT)
    return p - trust * (m * reciprocal(root + tl.load(numbers_ptr + _STEP_EPS), PTX)), m, v, s


@triton.jit
def _stable_measure(p, g, m, v, s, numbers_ptr, VARIANT: tl.constexpr, PTX: tl.constexpr):
    if VARIANT != "decoupled":
        g += tl.load(numbers_ptr + _DECAY) * p
    m, v = _new_moments(g, m, v, numbers_ptr)
    ratio = g * _root_above_eps(v, numbers_ptr, PTX)
    return ratio * ratio, ratio * 0.0


@triton.jit
def _root_above_eps(v, numbers_ptr, PTX: tl.constexpr):
    """1 / max(sqrt(v^), eps)."""
    root = square_root(v, PTX) * tl.load(numbers_ptr + _ROOT)
    return reciprocal(tl.maximum(root, tl.load(numbers_ptr + _EPS)), PTX)


@triton.jit
def _stable_trust(squares, unused, numel, numbers_ptr):
    return 1.0 / tl.maximum(1.0, tl.sqrt_rn(squares / numel))


@triton.jit
def _ademamix_numbers(hyper_ptr, numbers_ptr, lr, step):
    """Hyper-parameters 6 .. 10: log beta3, alpha, the steps of the warm-ups of alpha and beta3 (0: none), log beta1."""
    _adam_numbers(hyper_ptr, numbers_ptr, lr, step)
    log3, alpha = tl.load(hyper_ptr + 6), tl.load(hyper_ptr + 7)
    t_alpha, t_beta3, log1 = tl.load(hyper_ptr + 8), tl.load(hyper_ptr + 9), tl.load(hyper_ptr + 10)
    if t_alpha > 0:
        alpha = tl.minimum(step * alpha / t_alpha, alpha)
    if t_beta3 > 0:
        done = step / t_beta3
        log3 = tl.minimum(log1 * log3 / ((1.0 - done) * log3 + done * log1), log3)
    tl.store(numbers_ptr + _BETA3, tl.exp(log3))
    tl.store(numbers_ptr + _REST3, 1.0 - tl.exp(log3))
    tl.store(numbers_ptr + _ALPHA, alpha)


@triton.jit
def _ademamix_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    lr = tl.load(numbers_ptr + _LR)
    m, v = _new_moments(g, m, v, numbers_ptr)
    s += tl.load(numbers_ptr + _REST3) * g
    direction = tl.load(numbers_ptr + _MEAN) * m + tl.load(numbers_ptr + _ALPHA) * s
    p *= 1.0 - lr * tl.load(numbers_ptr + _DECAY)
    return p - lr * (direction * _inverse_root(v, numbers_ptr, PTX)), m, v, s


@triton.jit
def _lamb_direction(p, g, m, v, numbers_ptr, PTX: tl.constexpr):
    m, v = _new_moments(g, m, v, numbers_ptr)
    direction = tl.load(numbers_ptr + _MEAN) * m * _inverse_root(v, numbers_ptr, PTX)
    return direction + tl.load(numbers_ptr + _DECAY) * p, m, v


@triton.jit
def _lamb_update(p, g, m, v, s, numbers_ptr, trust, VARIANT: tl.constexpr, PTX: tl.constexpr):
    direction, m, v = _lamb_direction(p, g, m, v, numbers_ptr, PTX)
    return p - (tl.load(numbers_ptr + _LR) * trust) * direction, m, v, s


@triton.jit
def _lamb_measure(p, g, m, v, s, numbers_ptr, VARIANT: tl.constexpr, PTX: tl.constexpr):
    direction, m, v = _lamb_direction(p, g, m, v, numbers_ptr, PTX)
    return p * p, direction * direction


@triton.jit
def _lamb_trust(weight, direction, numel, numbers_ptr):
    return root_ratio(weight, direction)


@dataclass(frozen=True, kw_only=True)
class _Moments(Rule):
    betas: tuple[float, ...]
    eps: float
    weight_decay: float

    @property
    def signs(self) -> tuple[bool, ...]:
        return True, False

    def hyper(self) -> tuple[float, ...]:
        beta1, beta2 = self.betas[:2]
        return self.weight_decay, self.eps, beta1, beta2, _log(beta1), _log(beta2)

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        beta1, beta2 = self.betas[:2]
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        rests = 1 - beta1, 1 - beta2
        return float32(
            self.weight_decay, beta1, rests[0], beta2, rests[1], lr, 1 / bias1, 1 / math.sqrt(bias2), self.eps
        )


def _updated(g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> Tensor:
    """The denominator sqrt(v^) + eps, after both moments have changed in place."""
    _, beta1, rest1, beta2, rest2, _, _, root, eps = numbers[:9]
    moments[0].mul_(beta1).add_(g, alpha=rest1)
    moments[1].mul_(beta2).addcmul_(g, g, value=rest2)
    return moments[1].sqrt().mul_(root).add_(eps)


@dataclass(frozen=True, kw_only=True)
class Adam(_Moments):
    """Adam, or AdamW when `decoupled`; `stable` divides lr by max(1, RMS)."""

    decoupled: bool = False
    stable: bool = False

    kernels = RuleKernels(_adam_steps, _adam_update, (1, 3), _stable_measure, _stable_trust)

    @property
    def variant(self) -> str:
        return "decoupled" if self.decoupled else "l2"

    @property
    def measured(self) -> bool:
        return self.stable

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        scale = (1 - self.betas[0] ** step) / max(lr, _SMALLEST_RATE)
        root, eps = scale / math.sqrt(1 - self.betas[1] ** step), scale * self.eps
        return *super().numbers(lr, step), *float32(min(root, _LARGEST_NUMBER), min(eps, _LARGEST_NUMBER))

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, lr, mean = numbers[0], numbers[5] * trust, numbers[6]
        if self.decoupled:
            p.mul_(1 - lr * decay)
        else:
            g = g.add_(p, alpha=decay)
        denominator = _updated(g, moments, numbers)
        p.addcdiv_(moments[0], denominator, value=-lr * mean)

    def trust(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> float:
        decay, beta2, rest2, root, eps = (numbers[i] for i in (0, 3, 4, 7, 8))
        g = g if self.decoupled else g + decay * p
        denominator = (beta2 * moments[1] + rest2 * g * g).sqrt().mul_(root).clamp_(min=eps)
        return 1 / max(1.0, norm(g / denominator) / math.sqrt(max(g.numel(), 1)))


@dataclass(frozen=True, kw_only=True)
class AdEMAMix(_Moments):
    """Three betas; `t_alpha` and `t_beta3` are the steps of the warm-ups of alpha and beta3, None for none."""

    alpha: float
    t_alpha: int | None = None
    t_beta3: int | None = None

    kernels = RuleKernels(_ademamix_numbers, _ademamix_update, (1, 3, 9))

    @property
    def signs(self) -> tuple[bool, ...]:
        return True, False, True

    def hyper(self) -> tuple[float, ...]:
        log1, log3 = _log(max(self.betas[0], _SMALLEST_BETA)), _log(self.betas[2])
        return *super().hyper(), log3, self.alpha, float(self.t_alpha or 0), float(self.t_beta3 or 0), log1

    def numbers(self, lr: float, step: float) -> tuple[float, ...]:
        alpha = min(step * self.alpha / self.t_alpha, self.alpha) if self.t_alpha else self.alpha
        beta3 = self.betas[2]
        if self.t_beta3:
            log1, log3, done = _log(max(self.betas[0], _SMALLEST_BETA)), _log(beta3), step / self.t_beta3
            beta3 = min(math.exp(log1 * log3 / ((1 - done) * log3 + done * log1)), beta3)
        return *super().numbers(lr, step), *float32(beta3, 1 - beta3, alpha)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        decay, lr, mean, (beta3, rest3, alpha) = numbers[0], numbers[5], numbers[6], numbers[9:]
        denominator = _updated(g, moments, numbers)
        moments[2].mul_(beta3).add_(g, alpha=rest3)
        p.mul_(1 - lr * decay)
        p.addcdiv_(mean * moments[0] + alpha * moments[2], denominator, value=-lr)


_SMALLEST_BETA = 1e-30  # in the place of 0, whose half-life has no logarithm


@dataclass(frozen=True, kw_only=True)
class LAMB(_Moments):
    """Adam's direction and decay, scaled to the norm of the weight."""

    kernels = RuleKernels(_adam_numbers, _lamb_update, (1, 3), _lamb_measure, _lamb_trust)

    def update(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...], trust: float) -> None:
        p.sub_(self._direction(p, g, moments, numbers), alpha=numbers[5] * trust)

    def trust(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> float:
        return norm_ratio(norm(p), norm(self._direction(p, g, [m.clone() for m in moments], numbers)))

    def _direction(self, p: Tensor, g: Tensor, moments: list[Tensor], numbers: tuple[float, ...]) -> Tensor:
        denominator = _updated(g, moments, numbers)
        return (numbers[6] * moments[0] / denominator).add_(p, alpha=numbers[0])
