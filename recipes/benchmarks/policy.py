"""`benchmark=policy`: the table of this machine that linear="auto" decides from, goal T1.

One linear without a bias at a time: forward and both gradients, in each format that "auto" may choose here, beside
nn.Linear, eager and compiled. A step is timed as a training loop runs it, so it is the larger of what host and device
take. Weights and tokens are in bfloat16: in mixed precision nn.Linear casts float32 weights at every step and our
layers quantise them as they are, so 16 bits are at their best here. `speedup` is the quickest round of nn.Linear over
the second quickest of ours: noise leaves a layer in 16 bits, and a case that is all noise has no time.

Before a format is timed its step is compared with that of 16 bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin import convert
from lq_plugin.auto_format import Device, candidates
from lq_plugin.formats import TRAINABLE_FORMATS
from lq_plugin.recipes.benchmarks.cases import told_in
from lq_plugin.recipes.benchmarks.records import circumstances, command_line
from lq_plugin.recipes.benchmarks.timing import Stopwatch, Timing
from lq_plugin.recipes.benchmarks.train_linear import Shape, Step, check_parity, training_step
from lq_plugin.recipes.reports.policy_table import NAME, table_of
from lq_plugin.speed_table import keeps_weight_gradient

HEAD = f"{'format':24} {'in':>6} {'out':>6} {'mode':8}  {'16 bits':>9} {'ms':>9} {'spread':>7} {'speedup':>8}"

# Of GPT-2's sizes, Llama's and between: squares, and the wide and the narrow side of a feed-forward layer.
FULL = (
    *((512, 512), (768, 768), (768, 3072), (3072, 768)),
    *((1024, 1024), (1024, 4096), (4096, 1024)),
    *((2048, 2048), (2048, 8192), (8192, 2048)),
    *((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)),
)
SMALL = ((32, 32), (32, 64))
SMALL_TOKENS = 24
NN_LINEAR = "nn.Linear"
MOST_ROUNDS = 6


class Projection(nn.Module):
    """One linear of d features to f."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, f, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Case:
    """A shape (in_features, out_features) in a format, eager or compiled; as text, what `only` is held against."""

    shape: tuple[int, int]
    tokens: int
    format: str
    mode: str

    def __str__(self) -> str:
        return f"{self.format}, {self.mode}, {self.shape[0]}x{self.shape[1]}"


@dataclass(frozen=True)
class Speed:
    """Two times of a case, or the problem that kept them away."""

    case: Case
    device: Device
    plain: Timing | None = None
    ours: Timing | None = None
    problem: str | None = None

    @property
    def op(self) -> str:
        return str(self.case)

    @property
    def speedup(self) -> float | None:
        if self.plain is None or self.ours is None:
            return None
        return self.plain.ms / (self.ours.ms * (1 + self.ours.spread))

    def record(self) -> dict[str, Any]:
        times = {
            "nn_linear_ms": None if self.plain is None else self.plain.ms,
            "nn_linear_spread": None if self.plain is None else self.plain.spread,
            "ms": None if self.ours is None else self.ours.ms,
            "spread": None if self.ours is None else self.ours.spread,
            "speedup": self.speedup,
        }
        return {
            "name": NAME,
            "device": self.device.name,
            "architecture": self.device.architecture,
            "format": self.case.format,
            "in_features": self.case.shape[0],
            "out_features": self.case.shape[1],
            "tokens": self.case.tokens,
            "mode": self.case.mode,
            **{key: None if x is None else float(f"{x:.4g}") for key, x in times.items()},  # more digits are noise
            "problem": self.problem,
        }

    def row(self) -> str:
        case = self.case
        head = f"{case.format:24} {case.shape[0]:6} {case.shape[1]:6} {case.mode:8}"
        if self.plain is None or self.ours is None:
            return f"{head}  {self.problem}"
        return f"{head}  {self.plain.ms:9.4f} {self.ours.ms:9.4f} {self.ours.spread:7.1%} {self.speedup:7.3f}x"


@dataclass(frozen=True)
class PolicyBenchmark:
    """`table`: where the table goes; `sizes`: "full", "small", or "auto" for full ones on a GPU; `only` cases that hold
    one of these words; `formats`: none for those that "auto" knows on this device; `tokens` of a step of full sizes;
    about `seconds` for each time, of which two have to agree within `noise`, None for any."""

    table: str
    sizes: str = "auto"
    only: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eager", "compiled")
    tokens: int = 8192
    seconds: float = 0.05
    noise: float | None = 0.05
    head: str = HEAD

    def run(self, device: torch.device) -> Iterator[Speed]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        formats = self.formats or candidates(Device.of(device))
        check_formats(formats)
        watch, results = Stopwatch(device, self.seconds), []
        tokens = self.tokens if full else SMALL_TOKENS
        for shape in FULL if full else SMALL:
            for mode in self.modes:
                cases = [Case(shape, tokens, format, mode) for format in formats]
                wanted = [case for case in cases if not self.only or any(word in str(case) for word in self.only)]
                for speed in measured(wanted, watch, self.noise):
                    results.append(speed)
                    yield speed
        self._write(results, device)

    def _write(self, results: Sequence[Speed], device: torch.device) -> None:
        problems = [result.op for result in results if result.problem]
        if problems or not results:
            print(f"\nno table: {len(problems)} of {len(results)} cases have no time")
            return
        around = circumstances(device, command_line("recipes.benchmark"))
        table_of([result.record() | around for result in results]).write(self.table)
        path = Path(self.table).absolute()
        print(f"\ntable written to {path}: QuantPlugin(linear=Auto(table={str(path)!r})), from lq_plugin import Auto")


def check_formats(formats: Sequence[str]) -> None:
    """ValueError for a format that a table cannot hold."""
    allowed = [name for name, known in TRAINABLE_FORMATS.items() if keeps_weight_gradient(known)]
    for name in formats:
        if name not in allowed:
            raise ValueError(
                f"benchmark.formats has {name!r}; 'auto' chooses among those whose weight gradient stays in 16 bits: "
                f"{', '.join(allowed)}"
            )


def measured(cases: Sequence[Case], watch: Stopwatch, noise: float | None) -> Iterator[Speed]:
    """The cases of one shape and mode beside nn.Linear, which take turns; `noise` as in the benchmark."""
    if not cases:
        return
    problems: dict[str, str] = {}
    steps: dict[str, Step] = {}
    for name in (NN_LINEAR, *(case.format for case in cases)):
        with told_in(problems, name):
            steps[name] = _step(cases[0], name, watch.device)
    times = in_turns(steps, watch, noise, problems)
    for case in cases:
        said = [f"{who}: {problems[who]}" for who in (NN_LINEAR, case.format) if who in problems]
        speed = Speed(case, Device.of(watch.device), problem="; ".join(said) or None)
        yield speed if said else replace(speed, plain=times[NN_LINEAR], ours=times[case.format])


def _step(case: Case, name: str, device: torch.device) -> Step:
    shape = Shape(Projection, *case.shape, case.tokens)
    module = shape.make(device)
    if name != NN_LINEAR:
        check_parity(shape, TRAINABLE_FORMATS[name], device)
        convert(module, name)
    return training_step(module, shape, case.mode, device)


def in_turns(
    steps: Mapping[str, Step], watch: Stopwatch, noise: float | None, problems: dict[str, str]
) -> dict[str, Timing]:
    """The quickest round of each step, and how far the next one is from it; rounds go on until all of these are near.

    What else runs on a machine makes a step slower, seldom all of its rounds alike: two that agree are its own time.
    """
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, MOST_ROUNDS + 1):
        for name in [name for name in steps if name not in problems]:
            with told_in(problems, name):
                rounds[name] = sorted([*rounds[name], watch.time([steps[name]], queued=False).ms])
        known = {name: times for name, times in rounds.items() if name not in problems}
        apart = {name: times[1] / times[0] - 1 for name, times in known.items() if len(times) > 1}
        if number > 1 and (noise is None or all(spread <= noise for spread in apart.values())):
            break
    for name, spread in apart.items():
        if noise is not None and spread > noise:
            problems[name] = (
                f"no two of {MOST_ROUNDS} rounds agree within {noise:.0%}: "
                f"{', '.join(f'{ms:.4g}' for ms in known[name])} ms; measure again while nothing else runs here"
            )
    return {name: Timing(known[name][0], spread) for name, spread in apart.items() if name not in problems}
