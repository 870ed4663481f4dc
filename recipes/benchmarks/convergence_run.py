"""One training run of `benchmark=convergence`: a plain loop over text that lies on the device.

Seed and step alone decide which bytes are read, and the seed alone the initial weights, so that two variants differ in
nothing else. On a GPU the step is captured in a CUDA graph after a few steps, whatever the optimizer is: what is
replayed is what would be launched.
"""

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lq_plugin.conversion import convert
from lq_plugin.recipes.benchmarks.convergence_algorithms import learning_rate, make_optimizers
from lq_plugin.recipes.benchmarks.convergence_studies import Size, Variant
from lq_plugin.recipes.tasks.gpt import GPT
from lq_plugin.recipes.tasks.language_model import BYTES, cosine_share

EAGER_STEPS = 3  # before capture: kernels are compiled and states made
CURVE_POINTS = 10
RISEN = 0.5  # bits above its lowest tenth: a run whose last tenth is there has not recovered


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes to validate on, uint8, on one device."""

    training: Tensor
    validation: Tensor

    def training_windows(self, size: Size, seed: int) -> Tensor:
        """(steps, batch_size, context + 1): windows in the order of the seed, each once before any comes again."""
        needed, windows = size.steps * size.batch_size, len(self.training) // (size.context + 1)
        generator = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(windows, generator=generator) for _ in range(math.ceil(needed / windows))]
        return _windows(self.training, torch.cat(passes)[:needed], size).unflatten(0, (size.steps, size.batch_size))

    def validation_windows(self, size: Size) -> Tensor:
        """(n, context + 1): spread evenly over the text, always the same."""
        last = len(self.validation) // (size.context + 1) - 1
        return _windows(self.validation, torch.linspace(0, last, min(size.validation_windows, last + 1)).long(), size)


def _windows(text: Tensor, numbers: Tensor, size: Size) -> Tensor:
    length = size.context + 1
    positions = numbers[:, None] * length + torch.arange(length)
    return text[positions.to(text.device)]


@dataclass(frozen=True)
class Task:
    """A run to do. `bits_of_bytes`: the entropy of single bytes of the validation text."""

    variant: Variant
    size: Size
    seed: int
    bits_of_bytes: float
    cuda_graph: bool = True


@dataclass(frozen=True)
class Outcome:
    """bits_per_byte: of the validation text at the end; curve: mean training losses of the tenths of the run."""

    bits_per_byte: float
    diverged: bool
    tokens_per_second: float
    ms_per_step: float
    curve: tuple[float, ...]


def train(task: Task, text: Text) -> Outcome:
    """The run, on the device of the text."""
    return _Training(task, text).run()


class _Training:
    def __init__(self, task: Task, text: Text) -> None:
        size, variant = task.size, task.variant
        self.task, self.device = task, text.training.device
        self.on_gpu = self.device.type == "cuda"
        self.captures = self.on_gpu and task.cuda_graph
        torch.manual_seed(task.seed)
        self.model = _model(variant, size, self.device)
        peak, steps = learning_rate(variant), range(size.steps)
        self.rates = [peak * cosine_share(step, size.warmup_steps, size.steps) for step in steps]
        self.optimizers = make_optimizers(
            self.model, variant, torch.tensor(peak, device=self.device) if self.on_gpu else peak
        )
        self.windows = text.training_windows(size, task.seed)
        self.window = torch.empty_like(self.windows[0])
        self.validation = text.validation_windows(size)
        self.losses = torch.full((size.steps,), torch.nan, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(())

    def run(self) -> Outcome:
        size = self.task.size
        self._wait()
        if self.on_gpu:  # capture wants the steps before it on a stream that is not the default one
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                seconds = self._train()
        else:
            seconds = self._train()
        bits = self._validate()
        losses = (self.losses / math.log(2)).tolist()
        curve = _tenths(losses)
        timed = size.steps - EAGER_STEPS
        return Outcome(
            bits,
            diverged(losses, bits, curve, self.task.bits_of_bytes),
            timed * size.tokens_per_step / seconds,
            1e3 * seconds / timed,
            curve,
        )

    def _train(self) -> float:
        """All steps; the seconds that those after the first few took."""
        began = 0.0
        rates = torch.tensor(self.rates, device=self.device) if self.on_gpu else self.rates
        for step, rate in enumerate(rates):
            if step == EAGER_STEPS:
                if self.captures:
                    self._capture()
                self._wait()
                began = time.perf_counter()
            self.window.copy_(self.windows[step])
            self._set_rate(rate)
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            self.losses[step].copy_(self.loss)
        self._wait()
        return time.perf_counter() - began

    def _set_rate(self, rate: Any) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].copy_(rate)
                else:
                    group["lr"] = rate

    def _step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        loss = self._loss(self.window)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss = loss.detach()

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _loss(self, windows: Tensor) -> Tensor:
        """Cross entropy in nats per byte."""
        tokens = windows.long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def _validate(self) -> float:
        """Bits per byte."""
        batches = self.validation.split(self.task.size.batch_size)
        losses = torch.stack([self._loss(windows) * len(windows) for windows in batches])
        return float(losses.double().sum()) / len(self.validation) / math.log(2)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def _model(variant: Variant, size: Size, device: torch.device) -> GPT:
    with device:
        model = GPT(vocabulary=BYTES, width=size.width, depth=size.depth, heads=size.heads, context=size.context)
    if variant.weights != "float32":
        for parameter in model.parameters():  # not the buffers: angles stay float32
            parameter.data = parameter.data.to(getattr(torch, variant.weights))
    if variant.linear is not None:
        convert(model, variant.linear)
    return model


def _tenths(losses: list[float]) -> tuple[float, ...]:
    """Means of as many pieces as there are points, or of single values where there are fewer."""
    points = min(CURVE_POINTS, len(losses))
    edges = [len(losses) * i // points for i in range(points + 1)]
    return tuple(sum(losses[a:b]) / (b - a) for a, b in pairwise(edges))


def diverged(losses: list[float], bits: float, curve: tuple[float, ...], bits_of_bytes: float) -> bool:
    """Whether a loss was not finite, the text is predicted no better than by how often each byte occurs, or the
    training loss had been lower by RISEN. A run that merely learns slowly has not diverged."""
    if not all(map(math.isfinite, (*losses, bits))):
        return True
    return bits >= bits_of_bytes or curve[-1] > min(curve) + RISEN


def bits_of_single_bytes(text: Tensor) -> float:
    """The entropy of the bytes of a text, in bits for each, from how often each occurs."""
    shares = torch.bincount(text.cpu().int(), minlength=BYTES).double() / max(len(text), 1)
    return float(torch.special.entr(shares).sum() / math.log(2))
