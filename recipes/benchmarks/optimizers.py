"""`benchmark=optimizers`: AdamW8bit's step beside bitsandbytes', torchao's and torch's, and those of other algorithms.

    O1   16 layers of an 8B Llama: 144 tensors, 3.49e9 values, bfloat16        O2   3000 small tensors, 0.39e9 values
    O3   the same with percentile clipping, and with stochastic rounding       O4   with e4m3 state
    O5   one matrix of 1e9 values, float32                        O6   other algorithms on the model of O1

A step is timed as a training loop calls it, one after the other, so `ms` is the larger of what host and device take.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lq_plugin.recipes.benchmarks.cases import of_ceilings, told_in
from lq_plugin.recipes.benchmarks.records import Result, installed
from lq_plugin.recipes.benchmarks.timing import Ceilings, Stopwatch

Shapes = list[tuple[int, ...]]
Make = Callable[[list[Tensor]], Optimizer]

LEARNING_RATE = 1e-3
HYPER: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": 0.01}
_OWN_HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "LARS": {"momentum": 0.9},
}  # both have no state without
_MUON_STEPS = 5
_MUON_ERROR = 2.0**-4  # of the learning rate: products of bfloat16 matrices, added in another order
_CHECKED: Shapes = [(33, 512), (8, 1000), (64, 4, 32), (300,)]  # rows of whole blocks, ragged rows, more dimensions
_CHECKED_STEPS = 3


def llama(layers: int, width: int, hidden: int, keys: int) -> Shapes:
    """Queries, keys, values, output, gate, up, down, and two norms, of each layer."""
    attention: Shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    return layers * [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


@dataclass(frozen=True)
class Setup:
    """A model, an algorithm with its moments, options, and which others update the same model.

    error: of a parameter, in learning rates, between kernels and reference.
    """

    name: str
    what: str
    shapes: Shapes
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    algorithm: str = "AdamW"
    moments: int = 2
    error: float = 2.0**-16

    @property
    def values(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def bytes(self) -> int:
        """Parameters are read and written, gradients read; a code and 1/64 of a scale of each moment, read and written.

        One-dimensional tensors keep float32 moments.
        """
        of_moment = sum(prod(shape) * (2 * (1 + 4 / 256) if len(shape) > 1 else 8) for shape in self.shapes)
        return int(3 * self.dtype.itemsize * self.values + self.moments * of_moment)

    @property
    def operations(self) -> int:
        """Of Muon's products: x x', its square, and that times x, on the shorter side; None of the others has any."""
        if self.algorithm != "Muon":
            return 0
        sides = [(min(shape), max(shape)) for shape in self.shapes]
        return _MUON_STEPS * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)


def setups(llama_shapes: Shapes, small: Shapes, one: Shapes) -> Iterator[Setup]:
    everyone = ("bitsandbytes", "torchao", "torch")
    yield Setup("O1", "AdamW8bit", llama_shapes, peers=everyone)
    yield Setup("O3", "AdamW8bit, percentile 5", llama_shapes, options={"percentile_clipping": 5})
    yield Setup("O3", "AdamW8bit, stochastic rounding", llama_shapes, options={"stochastic_rounding": True})
    yield Setup("O4", "AdamW8bit, e4m3 state", llama_shapes, options={"state": "fp8"})
    yield Setup("O2", "AdamW8bit", small, peers=everyone)
    yield Setup("O2", "AdamW8bit, percentile 5", small, options={"percentile_clipping": 5})
    yield Setup("O5", "AdamW8bit", one, torch.float32, peers=("bitsandbytes", "torch"))
    yield from _other_algorithms(llama_shapes)


def _other_algorithms(shapes: Shapes) -> Iterator[Setup]:
    for algorithm, moments, peers in (
        ("Adam", 2, ("bitsandbytes", "torchao", "torch")),
        ("AdEMAMix", 3, ("bitsandbytes",)),
        ("Lion", 1, ("bitsandbytes",)),
        ("SGD", 1, ("bitsandbytes", "torch")),
        ("RMSprop", 1, ("bitsandbytes", "torch")),
        ("Adagrad", 1, ("bitsandbytes", "torch")),
        ("LAMB", 2, ("bitsandbytes",)),
        ("LARS", 1, ("bitsandbytes",)),
    ):
        yield Setup("O6", f"{algorithm}8bit", shapes, peers=peers, algorithm=algorithm, moments=moments)
    matrices: Shapes = [shape for shape in shapes if len(shape) == 2]
    how: dict[str, Any] = {"algorithm": "Muon", "moments": 1, "error": _MUON_ERROR}
    yield Setup("O6", "Muon8bit", matrices, peers=("torch",), **how)


FULL: tuple[Shapes, ...] = (llama(16, 4096, 14336, 1024), 1500 * [(512, 512), (512,)], [(31250, 32000)])
SMALL: tuple[Shapes, ...] = (llama(1, 64, 96, 64), 3 * [(64, 64), (64,)], [(64, 128)])


@dataclass(frozen=True)
class OptimizerBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU; `only` setups whose name or text holds one of these
    words; about `seconds` for each time."""

    sizes: str = "auto"
    only: tuple[str, ...] = ()
    seconds: float = 0.5

    def run(self, device: torch.device) -> Iterator[Result]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        watch = Stopwatch(device, self.seconds)
        torch.manual_seed(0)
        ceilings = Ceilings.measured(watch, *((2**31, 8192) if full else (2**16, 64)))
        yield from of_ceilings(ceilings)
        for setup in setups(*(FULL if full else SMALL)):
            if not self.only or any(word in f"{setup.name} {setup.what}" for word in self.only):
                yield measure(setup, watch, ceilings)
                _give_back(device)


def measure(setup: Setup, watch: Stopwatch, ceilings: Ceilings) -> Result:
    """A result with times, or with the problem that kept them away."""
    shape = f"{len(setup.shapes)} tensors, {setup.values:.3g}"
    dtype = str(setup.dtype).removeprefix("torch.")
    result = Result(setup.name, setup.what, shape, dtype, setup.bytes, setup.operations)
    problems: dict[str, str] = {}
    with told_in(problems, "ours"):
        check_parity(setup, watch.device)
        params = parameters(setup.shapes, setup.dtype, watch.device)
        result = _timed(ours(setup)(params), result, watch)
    if "ours" in problems:
        return replace(result, problem=problems["ours"])
    for peer in setup.peers:
        if peer == "torch" or installed(peer):
            with told_in(problems, peer):
                result.peers[peer] = watch.time([PEERS[peer](setup)(params).step], queued=False).ms
            _give_back(watch.device)
    floor = ceilings.floor_ms(setup.bytes, setup.operations) if watch.device.type == "cuda" else None
    return replace(result, floor_ms=floor, peer_problems=problems)


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random parameters with random gradients."""
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype) * 0.02) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def ours(setup: Setup) -> Make:
    return _of_module("lq_plugin.optim", setup, **setup.options)


def _of_module(module: str, setup: Setup, **more: Any) -> Make:
    optimizer = getattr(import_module(module), f"{setup.algorithm}8bit")
    return lambda params: optimizer(params, **HYPER, **_OWN_HYPER.get(setup.algorithm, {}), **more)


def _torch(setup: Setup) -> Make:
    """Moments in the dtype of the parameters; fused where torch has that."""
    fused: dict[str, Any] = {"fused": True} if setup.algorithm in _FUSED else {}
    optimizer = getattr(torch.optim, setup.algorithm)
    return lambda params: optimizer(params, **HYPER, **_OWN_HYPER.get(setup.algorithm, {}), **fused)


_FUSED = ("AdamW", "Adam", "SGD")
PEERS: dict[str, Callable[[Setup], Make]] = {
    "bitsandbytes": partial(_of_module, "bitsandbytes.optim"),
    "torchao": partial(_of_module, "torchao.optim"),  # it compiles its step by itself, once for each shape
    "torch": _torch,
}


def _timed(optimizer: Optimizer, result: Result, watch: Stopwatch) -> Result:
    timing = watch.time([optimizer.step], queued=False)
    more = {"host_ms": watch.host_ms(optimizer.step)}
    if watch.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        more |= {"graph_ms": watch.time([graph.replay]).ms, "graph_host_ms": watch.host_ms(graph.replay)}
    return replace(result, ms=timing.ms, spread=timing.spread, more=more)


def check_parity(setup: Setup, device: torch.device) -> None:
    """A few steps of the kernels against those of the reference; AssertionError if they part."""
    shapes = [shape for shape in _CHECKED if setup.algorithm != "Muon" or len(shape) == 2]
    reference = parameters(shapes, setup.dtype, torch.device("cpu"))
    params: list[Tensor] = [torch.nn.Parameter(param.detach().to(device, copy=True)) for param in reference]
    optimizers = ours(setup)(reference), ours(setup)(params)
    for _ in range(_CHECKED_STEPS):
        for param, expected in zip(params, reference, strict=True):
            expected.grad = torch.randn_like(expected) * 1e-3
            param.grad = expected.grad.to(device)
        for optimizer in optimizers:
            optimizer.step()
    for param, expected in zip(params, reference, strict=True):
        _assert_close(param.detach().cpu().double(), expected.detach().double(), setup)


def _assert_close(got: Tensor, expected: Tensor, setup: Setup) -> None:
    """A moment may be read back as the neighbouring code, which happens to one in 2^14 of them and moves a parameter by
    a fraction of the learning rate; all others are off by at most a rounding of theirs, or of the update."""
    error = (got - expected).abs()
    far = error > torch.finfo(setup.dtype).eps * expected.abs() + setup.error * LEARNING_RATE
    assert far.double().mean() <= 2.0**-8, f"{float(far.double().mean()):.2%} of the parameters are off"
    assert error.max() <= _CHECKED_STEPS * LEARNING_RATE, f"a parameter is off by {float(error.max()):.2e}"


def _give_back(device: torch.device) -> None:
    """The memory of what came before, to the device: the next state has other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
