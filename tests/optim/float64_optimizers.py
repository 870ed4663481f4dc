"""Every optimizer in float64, one tensor at a time: the expectation for kernels and classes.

An algorithm is a frozen dataclass of its hyper-parameters. `moments` is its state before the first step, by torch's
names; `update` returns the new parameter and writes the new moments; t counts the steps of that tensor from 1. The
float64 reference takes none of the ops' paths: it imports torch and nothing of ours.

    reference = Float64Optimizer(params, AdamW(lr=1e-3), percentile=5)
    reference.step(grads)                 # None leaves a tensor alone
    reference.params[i], reference.moments[i]["exp_avg"], reference.steps[i], reference.clipping[i].clipped
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Moments = dict[str, Tensor]

HISTORY_LENGTH = 100


class Algorithm:
    """One optimizer; subclasses are dataclasses that hold `lr` and the rest of its hyper-parameters."""

    names: tuple[str, ...] = ()

    def moments(self, p: Tensor) -> Moments:
        return {name: torch.zeros_like(p) for name in self.names}

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        raise NotImplementedError


def average(moments: Moments, name: str, x: Tensor, beta: float) -> Tensor:
    """The exponential moving average `name`, brought up to date with x."""
    moments[name] = beta * moments[name] + (1 - beta) * x
    return moments[name]


def update_clip(g: Tensor, v_hat: Tensor, eps: float) -> float:
    """max(1, RMS) by which StableAdamW divides the learning rate: RMS^2 = mean(g^2 / max(v_hat, eps^2)).

    Source: algorithm 2 of https://arxiv.org/abs/2304.13013, whose debiased averages are v_hat = v / (1 - beta2^t).
    """
    return max(1.0, (g**2 / v_hat.clamp(min=eps**2)).mean().sqrt().item()) if g.numel() else 1.0


@dataclass(frozen=True)
class Adam(Algorithm):
    """https://arxiv.org/abs/1412.6980; weight decay is L2. `stable` is StableAdamW's clip of decay and update."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    stable: bool = False

    names = ("exp_avg", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        if not self.decoupled:
            g = g + self.weight_decay * p
        m_hat = average(moments, "exp_avg", g, self.betas[0]) / (1 - self.betas[0] ** t)
        v_hat = average(moments, "exp_avg_sq", g**2, self.betas[1]) / (1 - self.betas[1] ** t)
        lr = self.lr / update_clip(g, v_hat, self.eps) if self.stable else self.lr
        if self.decoupled:
            p = p * (1 - lr * self.weight_decay)
        return p - lr * m_hat / (v_hat.sqrt() + self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """https://arxiv.org/abs/1711.05101; weight decay is decoupled, before the update."""

    weight_decay: float = 1e-2
    decoupled: bool = True


@dataclass(frozen=True)
class AdEMAMix(Algorithm):
    """https://arxiv.org/abs/2409.03137; the slow average is not bias corrected, weight decay is decoupled.

    `t_alpha` and `t_beta3` are the lengths of the warm-ups of alpha (linear) and beta3 (linear in its half-life).
    """

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 5.0
    eps: float = 1e-8
    weight_decay: float = 1e-2
    t_alpha: int | None = None
    t_beta3: int | None = None

    names = ("exp_avg", "exp_avg_sq", "exp_avg_slow")

    def alpha_at(self, t: int) -> float:
        return self.alpha if self.t_alpha is None else min(t * self.alpha / self.t_alpha, self.alpha)

    def beta3_at(self, t: int) -> float:
        if self.t_beta3 is None:
            return self.betas[2]
        log1, log3, done = math.log(self.betas[0]), math.log(self.betas[2]), t / self.t_beta3
        return min(math.exp(log1 * log3 / ((1 - done) * log3 + done * log1)), self.betas[2])

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        m_hat = average(moments, "exp_avg", g, self.betas[0]) / (1 - self.betas[0] ** t)
        v_hat = average(moments, "exp_avg_sq", g**2, self.betas[1]) / (1 - self.betas[1] ** t)
        slow = average(moments, "exp_avg_slow", g, self.beta3_at(t))
        p = p * (1 - self.lr * self.weight_decay)
        return p - self.lr * (m_hat + self.alpha_at(t) * slow) / (v_hat.sqrt() + self.eps)


@dataclass(frozen=True)
class Lion(Algorithm):
    """https://arxiv.org/abs/2302.06675; sign(0) = 0, weight decay is decoupled."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    names = ("exp_avg",)

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        direction = (self.betas[0] * moments["exp_avg"] + (1 - self.betas[0]) * g).sign()
        average(moments, "exp_avg", g, self.betas[1])
        return p * (1 - self.lr * self.weight_decay) - self.lr * direction


@dataclass(frozen=True)
class SGD(Algorithm):
    """torch.optim.SGD: weight decay is L2, and the first gradient enters the momentum without dampening."""

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def moments(self, p: Tensor) -> Moments:
        return {"momentum_buffer": torch.zeros_like(p)} if self.momentum else {}

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        g = g + self.weight_decay * p
        if not self.momentum:
            return p - self.lr * g
        share = 1.0 if t == 1 else 1 - self.dampening
        moments["momentum_buffer"] = self.momentum * moments["momentum_buffer"] + share * g
        direction = moments["momentum_buffer"]
        return p - self.lr * (g + self.momentum * direction if self.nesterov else direction)


@dataclass(frozen=True)
class RMSprop(Algorithm):
    """torch.optim.RMSprop: weight decay is L2; `centered` takes the variance in the place of the mean square."""

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def moments(self, p: Tensor) -> Moments:
        kept = {"square_avg": True, "grad_avg": self.centered, "momentum_buffer": self.momentum != 0}
        return {name: torch.zeros_like(p) for name in kept if kept[name]}

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        g = g + self.weight_decay * p
        variance = average(moments, "square_avg", g**2, self.alpha)
        if self.centered:
            variance = variance - average(moments, "grad_avg", g, self.alpha) ** 2
        direction = g / (variance.sqrt() + self.eps)
        if self.momentum:
            direction = moments["momentum_buffer"] = self.momentum * moments["momentum_buffer"] + direction
        return p - self.lr * direction


@dataclass(frozen=True)
class Adagrad(Algorithm):
    """torch.optim.Adagrad, https://jmlr.org/papers/v12/duchi11a.html; weight decay is L2."""

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    names = ("sum",)

    def moments(self, p: Tensor) -> Moments:
        return {"sum": torch.full_like(p, self.initial_accumulator_value)}

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        g = g + self.weight_decay * p
        moments["sum"] = moments["sum"] + g**2
        lr = self.lr / (1 + (t - 1) * self.lr_decay)
        return p - lr * g / (moments["sum"].sqrt() + self.eps)


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator; 1 where either is zero, so that a parameter of zeros can move."""
    return numerator / denominator if numerator and denominator else 1.0


@dataclass(frozen=True)
class LAMB(Algorithm):
    """Algorithm 2 of https://arxiv.org/abs/1904.00962: p <- p - lr ||p|| / ||u|| u, u = Adam's direction + wd p.

    Choices where the paper leaves one: phi is the identity, and the trust ratio is 1 where a norm is zero.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    names = ("exp_avg", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        m_hat = average(moments, "exp_avg", g, self.betas[0]) / (1 - self.betas[0] ** t)
        v_hat = average(moments, "exp_avg_sq", g**2, self.betas[1]) / (1 - self.betas[1] ** t)
        u = m_hat / (v_hat.sqrt() + self.eps) + self.weight_decay * p
        return p - self.lr * ratio(p.norm().item(), u.norm().item()) * u


@dataclass(frozen=True)
class LARS(Algorithm):
    """Algorithm 1 of https://arxiv.org/abs/1708.03888; the momentum holds steps, learning rates included.

        local = trust ||p|| / (||g|| + wd ||p||);  v <- momentum v + lr local (g + wd p);  p <- p - v

    Choice: the local rate is 1 where ||p|| or the denominator is zero. `trust` is the paper's eta.
    """

    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust: float = 0.001

    names = ("momentum_buffer",)

    def update(self, p: Tensor, g: Tensor, moments: Moments, t: int) -> Tensor:
        norm = p.norm().item()
        local = ratio(self.trust * norm, g.norm().item() + self.weight_decay * norm)
        step = self.lr * local * (g + self.weight_decay * p)
        moments["momentum_buffer"] = self.momentum * moments["momentum_buffer"] + step
        return p - moments["momentum_buffer"]


@dataclass
class PercentileClipping:
    """Clips a tensor's gradient at a percentile of its last 100 norms; the new norm is one of them.

    The first finite, non-zero norm fills all 100 slots. A zero gradient is neither clipped nor recorded; a gradient
    whose norm is not finite is to be skipped.
    """

    percentile: int
    history: list[float] = field(default_factory=list)
    recorded: int = 0
    clipped: int = 0
    skipped: int = 0

    def factor(self, grad: Tensor) -> float | None:
        """What the gradient is multiplied with, or None to skip it."""
        norm = grad.double().norm().item()
        if not math.isfinite(norm):
            self.skipped += 1
            return None
        if norm == 0:
            return 1.0
        if not self.history:
            self.history = [norm] * HISTORY_LENGTH
        self.history[self.recorded % HISTORY_LENGTH] = norm
        self.recorded += 1
        limit = sorted(self.history)[self.percentile]
        self.clipped += norm > limit
        return min(1.0, limit / norm)


ALGORITHMS: dict[str, type[Algorithm]] = {
    cls.__name__.lower(): cls for cls in (Adam, AdamW, AdEMAMix, Lion, SGD, RMSprop, Adagrad, LAMB, LARS)
}


class Float64Optimizer:
    """One algorithm over several tensors; parameters and moments are float64 copies."""

    def __init__(
        self,
        params: Sequence[Tensor],
        algorithm: Algorithm,
        *,
        maximize: bool = False,
        percentile: int | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.params = [p.detach().double().clone() for p in params]
        self.moments = [algorithm.moments(p) for p in self.params]
        self.steps = [0] * len(self.params)
        self.clipping = [PercentileClipping(percentile) for _ in self.params] if percentile is not None else None
        self._sign = -1.0 if maximize else 1.0

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            factor = None if grad is None else 1.0
            if grad is not None and self.clipping is not None:
                factor = self.clipping[i].factor(grad)
            if grad is None or factor is None:
                continue
            self.steps[i] += 1
            g = grad.detach().double() * (self._sign * factor)
            self.params[i] = self.algorithm.update(self.params[i], g, self.moments[i], self.steps[i])
