"""`benchmark=switchback`: SwitchBack's three products and its quantisations beside fp16, goal I3.

The grid and the keys are those of bitsandbytes' speed_benchmark.py (until 0.49): wm = 4, six widths, five batches, the
narrow side in or out. Milliseconds, each the mean of `repeat` calls after half as many:

    time_standard  standard_fwd + standard_gx + standard_gw
    time_rowwise   x_quantize_rowwise + g_quantize_rowwise + w_quantize_colwise_transpose + w_quantize_rowwise
                   + standard_gw + rowwise_fwd + rowwise_bwd
    time_global    x_quantize_rowwise + g_quantize_rowwise + w_quantize_global + w_quantize_global_transpose
                   + standard_gw + global_fwd + global_bwd
    saved_*        (time_standard - time_*) / time_standard: 0.25 is a quarter of the time saved

There the scales were not those of the data, two of them of the wrong length; here every product that is timed is
checked. The quantisations are those of the layers: the amax of the weight is taken once, in w_quantize_global and in
w_quantize_rowwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import torch
from lq_kernels.rowwise import quantize_rowwise
from lq_kernels.rowwise_training import (
    quantize_rowwise_column_amax,
    quantize_tensorwise_amax,
    quantize_transposed,
)
from lq_kernels.scaled_mm import scaled_mm
from torch import Tensor

from lq_plugin.recipes.benchmarks.cases import ends, told_in
from lq_plugin.recipes.benchmarks.timing import Call

WIDEN = 4
WIDTHS = (1024, 1280, 1408, 1664, 2048, 4096)
BATCHES = tuple(256 * n for n in (32, 64, 128, 256, 512))
HEAD = f"{'tokens':>7} {'in':>6} {'out':>6}  {'fp16':>9} {'rowwise':>9} {'saved':>7} {'global':>9} {'saved':>7}"

PARTS = {
    "time_standard": ("standard_fwd", "standard_gx", "standard_gw"),
    "time_rowwise": (
        *("x_quantize_rowwise", "g_quantize_rowwise", "w_quantize_colwise_transpose", "w_quantize_rowwise"),
        *("standard_gw", "rowwise_fwd", "rowwise_bwd"),
    ),
    "time_global": (
        *("x_quantize_rowwise", "g_quantize_rowwise", "w_quantize_global", "w_quantize_global_transpose"),
        *("standard_gw", "global_fwd", "global_bwd"),
    ),
}


@dataclass(frozen=True)
class Size:
    batch_size: int
    dim: int
    switch: bool

    @property
    def dims(self) -> tuple[int, int]:
        """in_features and out_features."""
        return (WIDEN * self.dim, self.dim) if self.switch else (self.dim, WIDEN * self.dim)


GRID = [Size(batch, dim, switch) for dim, batch, switch in product(WIDTHS, BATCHES, (False, True))]
SMALL = [Size(24, 32, switch) for switch in (False, True)]


@dataclass(frozen=True)
class Comparison:
    """One size: the milliseconds of each part, or the problem that kept them away."""

    size: Size
    repeat: int
    ms: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    @property
    def op(self) -> str:
        return "switchback {} {}->{}".format(self.size.batch_size, *self.size.dims)

    def record(self) -> dict[str, Any]:
        dim_in, dim_out = self.size.dims
        sums = {name: sum(self.ms[part] for part in parts) for name, parts in PARTS.items()} if self.ms else {}
        saved = {
            name.replace("time", "saved"): 1 - ms / sums["time_standard"]
            for name, ms in sums.items()
            if name != "time_standard"
        }
        return {
            "name": "I3",
            "repeat": self.repeat,
            "batch_size": self.size.batch_size,
            "dim_out": dim_out,
            "dim_in": dim_in,
            "wm": WIDEN,
            "switch": self.size.switch,
            **{key: float(f"{value:.4g}") for key, value in {**self.ms, **sums, **saved}.items()},
            "problem": self.problem,
        }

    def row(self) -> str:
        record = self.record()
        head = f"{record['batch_size']:7} {record['dim_in']:6} {record['dim_out']:6}"
        if self.problem:
            return f"{head}  {self.problem}"
        rest = (f"{record[f'time_{name}']:9.4f} {record[f'saved_{name}']:7.1%}" for name in ("rowwise", "global"))
        return f"{head}  {record['time_standard']:9.4f} {' '.join(rest)}"


@dataclass(frozen=True)
class SwitchbackBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU; `repeat` calls for each time; `widths` and `batches`
    of the grid, none for all."""

    sizes: str = "auto"
    repeat: int = 64
    widths: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    head: str = HEAD

    def run(self, device: torch.device) -> Iterator[Comparison]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        torch.manual_seed(0)
        for size in GRID if full else SMALL:
            if full and self.widths and size.dim not in self.widths:
                continue
            if full and self.batches and size.batch_size not in self.batches:
                continue
            problems: dict[str, str] = {}
            ms: dict[str, float] = {}
            with told_in(problems, "ours"):
                ms = {name: mean_ms(call, self.repeat, device) for name, call in calls(size, device)}
            yield Comparison(size, self.repeat, {} if problems else ms, problems.get("ours"))


def calls(size: Size, device: torch.device) -> Iterator[tuple[str, Call]]:
    """Every part by name; the results of the products are checked before."""
    dim_in, dim_out = size.dims
    shapes = ((size.batch_size, dim_in), (dim_out, dim_in), (size.batch_size, dim_out))
    x, w, g = (torch.randn(shape, device=device, dtype=torch.float16) for shape in shapes)
    yield "standard_fwd", lambda: x @ w.t()
    yield "standard_gw", lambda: g.t() @ x
    yield "standard_gx", lambda: g @ w
    x_codes, x_scale = quantize_rowwise(x)
    g_codes, g_scale = quantize_rowwise(g)
    w_codes, w_scale, column_amax = quantize_rowwise_column_amax(w)
    all_codes, scale, amax, _ = quantize_tensorwise_amax(w)
    by_column, global_transposed = quantize_transposed(w, column_amax), quantize_transposed(w, amax)
    operands = {
        "rowwise_fwd": (x_codes, w_codes.t(), x_scale, w_scale.t()),
        "rowwise_bwd": (g_codes, by_column[0].t(), g_scale, by_column[1].t()),
        "global_fwd": (x_codes, all_codes.t(), x_scale, scale),
        "global_bwd": (g_codes, global_transposed[0].t(), g_scale, scale),
    }
    exact = {"fwd": (x, w.t()), "bwd": (g, w)}
    for name, codes in operands.items():
        multiply = partial(scaled_mm, *codes, None, torch.float16)
        check(multiply(), codes, exact[name[-3:]])
        yield name, multiply
    yield "x_quantize_rowwise", lambda: quantize_rowwise(x)
    yield "g_quantize_rowwise", lambda: quantize_rowwise(g)
    yield "w_quantize_rowwise", lambda: quantize_rowwise_column_amax(w)
    yield "w_quantize_colwise_transpose", lambda: quantize_transposed(w, column_amax)
    yield "w_quantize_global", lambda: quantize_tensorwise_amax(w)
    yield "w_quantize_global_transpose", lambda: quantize_transposed(w, amax)


def check(output: Tensor, operands: tuple[Tensor, ...], exact: tuple[Tensor, Tensor]) -> None:
    """AssertionError where the first or last rows are not the scaled product of the codes, rounded to float16, or are
    further from the exact product than int8 of normal values takes them: 0.8 % for a scale by row, 1.3 % for one."""
    codes_a, codes_b, scale_a, scale_b = operands
    for some in ends(len(output)):
        got = output[some].double()
        expected = (codes_a[some].double() @ codes_b.double()) * scale_a[some].double() * scale_b.double()
        # Two products with scales are rounded to float32, and the result to float16.
        allowed = expected.abs() * (2.0**-11 + 2.0**-22) + 2.0**-25
        assert bool(((got - expected).abs() <= allowed).all()), "a product is not that of its codes and scales"
        product = exact[0][some].double() @ exact[1].double()
        error = float((got - product).norm() / product.norm())
        assert error < _LARGEST_ERROR, f"a product is off by {error:.1%}"


_LARGEST_ERROR = 0.025


def mean_ms(call: Call, repeat: int, device: torch.device) -> float:
    """As bitsandbytes times it: half as many calls before, then the mean of all."""
    for _ in range(max(1, repeat // 2)):
        call()
    if device.type != "cuda":
        began = perf_counter()
        for _ in range(repeat):
            call()
        return 1e3 * (perf_counter() - began) / repeat
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / repeat
