"""`benchmark=train_linear`: forward and backward of linears in every trainable format, goals I4, F1 and T1.

    MLP         down(silu(gate(x)) * up(x)), the feed-forward part of a Llama layer
    attention   its four projections: queries, keys and values of x, and the output

A step is timed as a training loop runs it, the gradients made anew each time: `ms` is the larger of what host and
device take, `device_ms` what the device takes when the host is ahead. Eager stands beside eager and compiled beside
compiled: bf16 is nn.Linear, torchao its trainings on int8 and float8, which need a compiler. Before a format is timed
its step is compared with that of 16 bits, on the same weights and tokens.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin import convert
from lq_plugin.formats import TRAINABLE_FORMATS, GemmFormats
from lq_plugin.recipes.benchmarks.cases import of_ceilings, told_in
from lq_plugin.recipes.benchmarks.records import Result, installed
from lq_plugin.recipes.benchmarks.timing import Ceilings, Stopwatch

Step = Callable[[], tuple[Tensor, ...]]

# The most that an output or a gradient may differ from 16 bits, relative to its norm: fp8 with one scale for a tensor
# has 5 % for each operand of a gradient, and three products follow each other.
LARGEST_DIFFERENCE = 0.2

GOALS = {"int8": "I4", "fp8": "F1"}


class Mlp(nn.Module):
    """d features, f in the middle; for T tokens."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Four projections of d features, two of them to f; their outputs side by side."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.o(self.q(x)), self.k(x), self.v(x)], dim=-1)


@dataclass(frozen=True)
class Shape:
    """A module of d and f features, and the tokens of a batch."""

    module: type[nn.Module]
    d: int
    f: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.module.__name__} {self.d}, {self.f}; {self.tokens}"

    def make(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        with device:
            return self.module(self.d, self.f).to(_dtype(device))

    @property
    def operations(self) -> int:
        """Of three products for each weight."""
        weights = 3 * self.d * self.f if self.module is Mlp else 2 * self.d * (self.d + self.f)
        return 3 * 2 * self.tokens * weights


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


MLPS = [(1024, 4096, 32768), (2048, 8192, 16384), (4096, 14336, 8192), (4096, 14336, 16384)]
ATTENTIONS = [(1024, 1024, 32768), (2048, 512, 16384), (4096, 1024, 8192), (4096, 1024, 16384)]
FULL = [*(Shape(Mlp, *sizes) for sizes in MLPS), *(Shape(Attention, *sizes) for sizes in ATTENTIONS)]
SMALL = [Shape(Mlp, 32, 64, 24), Shape(Attention, 32, 16, 24)]

TORCHAO = {
    "int8_rowwise": "int8_mixed_precision",
    "fp8_tensorwise": "tensorwise",
    "fp8_rowwise": "rowwise",
    "fp8_rowwise_with_gw_hp": "rowwise_with_gw_hp",
}


def torchao(name: str, module: nn.Module) -> nn.Module:
    """The module in a training of torchao's; a shape that it leaves alone is an error."""
    before = type(module.get_submodule(next(name for name, _ in module.named_children())))
    if name == "int8_mixed_precision":
        training = import_module("torchao.prototype.quantized_training")
        import_module("torchao.quantization").quantize_(module, training.int8_mixed_precision_training())
        return module
    float8 = import_module("torchao.float8")
    module = float8.convert_to_float8_training(module, config=float8.Float8LinearConfig.from_recipe_name(name))
    assert not any(type(child) is before for child in module.children()), "torchao left a linear alone"
    return module


@dataclass(frozen=True)
class TrainLinearBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU; `only` shapes, formats or modes whose name holds one
    of these words; `formats`: names, none for all; `modes`: "eager", "compiled" or both; about `seconds` for each time.
    """

    sizes: str = "auto"
    only: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eager", "compiled")
    seconds: float = 0.3

    def run(self, device: torch.device) -> Iterator[Result]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        watch = Stopwatch(device, self.seconds)
        ceilings = Ceilings.measured(watch, *((2**31, 8192) if full else (2**16, 64)))
        yield from of_ceilings(ceilings)
        for shape in FULL if full else SMALL:
            peers = Peers(shape, watch)
            for mode in self.modes:
                for formats in self._formats():
                    words = f"{shape}, {formats.name}, {mode}"
                    if not self.only or any(word in words for word in self.only):
                        yield measure(Measurement(shape, formats, mode), watch, ceilings, peers)
                        _give_back(device)

    def _formats(self) -> list[GemmFormats]:
        names = self.formats or [name for name in TRAINABLE_FORMATS if not name.startswith("sim_")]
        return [TRAINABLE_FORMATS[name] for name in names]


@dataclass(frozen=True)
class Measurement:
    shape: Shape
    formats: GemmFormats
    mode: str


@dataclass
class Peers:
    """Steps of others at one shape, each timed once, when it is first asked for."""

    shape: Shape
    watch: Stopwatch
    ms: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def bf16(self, mode: str) -> str:
        """nn.Linear."""
        return self._time(f"bf16, {mode}", lambda module: module, mode)

    def torchao(self, formats: str) -> str:
        """torchao compiled, where it has such a training and a GPU for it."""
        name = TORCHAO.get(formats, "")
        if not name or not installed("torchao") or self.watch.device.type != "cuda":
            return ""
        return self._time(f"torchao {name}, compiled", partial(torchao, name), "compiled")

    def _time(self, name: str, change: Callable[[nn.Module], nn.Module], mode: str) -> str:
        if name not in self.ms and name not in self.problems:
            with told_in(self.problems, name):
                module = change(self.shape.make(self.watch.device))
                step = training_step(module, self.shape, mode, self.watch.device)
                self.ms[name] = self.watch.time([step], queued=False).ms
            _give_back(self.watch.device)
        return name


def measure(what: Measurement, watch: Stopwatch, ceilings: Ceilings, peers: Peers) -> Result:
    """A result with times, or with the problem that kept them away."""
    shape, formats, mode = what.shape, what.formats, what.mode
    name = next((goal for prefix, goal in GOALS.items() if formats.name.startswith(prefix)), "T1")
    dtype = str(_dtype(watch.device)).removeprefix("torch.")
    result = Result(name, f"{formats.name}, {mode}", str(shape), dtype, 0, shape.operations)
    problems: dict[str, str] = {}
    with told_in(problems, "ours"):
        check_parity(shape, formats, watch.device)
        module = shape.make(watch.device)
        convert(module, formats)
        step = training_step(module, shape, mode, watch.device)
        timing = watch.time([step], queued=False)
        more = {"device_ms": watch.time([step]).ms} | _memory(step, watch.device)
        result = replace(result, ms=timing.ms, spread=timing.spread, more=more)
    if "ours" in problems:
        return replace(result, problem=problems["ours"])
    others = [name for name in (peers.bf16(mode), peers.torchao(formats.name)) if name]
    floor = ceilings.floor_ms(0, shape.operations, formats.bits) if watch.device.type == "cuda" else None
    return replace(
        result,
        floor_ms=floor,
        peers={name: peers.ms[name] for name in others if name in peers.ms},
        peer_problems={name: peers.problems[name] for name in others if name in peers.problems},
    )


def training_step(module: nn.Module, shape: Shape, mode: str, device: torch.device) -> Step:
    """Forward and backward on the same tokens; gradients are made anew."""
    torch.manual_seed(1)
    x = torch.randn(shape.tokens, shape.d, device=device, dtype=_dtype(device), requires_grad=True)
    torch.compiler.reset()  # each module is another graph of the same code, and they are more than it keeps
    function = torch.compile(module) if mode == "compiled" else module
    with torch.no_grad():
        grad = torch.randn_like(module(x))

    def step() -> tuple[Tensor, ...]:
        x.grad = None
        module.zero_grad(set_to_none=True)
        output = function(x)
        output.backward(grad)
        return output, *(leaf.grad for leaf in (x, *module.parameters()) if leaf.grad is not None)

    return step


def check_parity(shape: Shape, formats: GemmFormats, device: torch.device) -> None:
    """A step in the format beside one in 16 bits; AssertionError where they part."""
    tokens = replace(shape, tokens=min(shape.tokens, 2048))
    module = shape.make(device)
    exact = training_step(copy.deepcopy(module), tokens, "eager", device)()
    convert(module, formats)
    for name, got, expected in zip(
        ("output", "grad_input", *(name for name, _ in module.named_parameters())),
        training_step(module, tokens, "eager", device)(),
        exact,
        strict=True,
    ):
        got, expected = got.detach().float(), expected.detach().float()
        error = float((got - expected).norm() / expected.norm())
        assert error <= LARGEST_DIFFERENCE, f"{name} is off by {error:.1%} of its norm"


def _memory(step: Step, device: torch.device) -> dict[str, float]:
    """What a step needs at most beside the weights and the tokens, in GB."""
    if device.type != "cuda":
        return {}
    _give_back(device)
    before: Any = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return {"peak_gb": (torch.cuda.max_memory_allocated(device) - before) / 1e9}


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
