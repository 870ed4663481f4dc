"""`benchmark=matmul`: a linear layer in eight ways, for a growing number of rows, its parts timed apart.

    B1 fp16                   B5 int8, outliers at 6        the weight is quantised in every call of B4 and B5
    B2 nf4                    B6 int8 sums alone            both operands are quantised already
    B3 nf4, double            B7 Linear8bitLt
    B4 int8                   B8 Linear8bitLt, outliers     frozen in int8

Each is its product; beside the products what has to be done to weights, inputs and sums. A result is compared with a
float64 product before it is timed, and the last one that was timed is compared again. Names are those of bitsandbytes,
so that one function measures ours and theirs. Five columns of the input are 8: outliers at a threshold of 6.

Source of the cases: bitsandbytes' test of the same name, tests/test_functional.py, of which batch 1 is all there is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lq_kernels
import lq_kernels.functional as lq_functional
import torch
import torch.nn.functional as F
from torch import Tensor

from lq_plugin.recipes.benchmarks.cases import Case, Inputs, Outputs, assert_close, ends, measure, of_ceilings
from lq_plugin.recipes.benchmarks.matmul_figure import draw
from lq_plugin.recipes.benchmarks.records import Result
from lq_plugin.recipes.benchmarks.timing import Call, Ceilings, Stopwatch

THRESHOLD, OUTLIER, OUTLIERS, LARGEST_OTHER = 6.0, 8.0, 5, 5.5
BLOCK_SIZE = 64

# Relative errors: of a result rounded to float16, of inputs in int8 with and without the outliers in their scale.
FP16_ERROR, INT8_ERROR, INT8_ERROR_WITHOUT_OUTLIERS = 2.0**-9, 0.04, 0.02


@dataclass(frozen=True)
class Library:
    """Ours or bitsandbytes."""

    functional: Any
    matmul: Callable[..., Tensor]
    matmul_4bit: Callable[..., Tensor]

    def layer(self, weight: Tensor, threshold: float) -> Callable[[Tensor], Tensor]:
        """Linear8bitLt with a weight frozen in int8."""
        module = "lq_plugin.layers" if self.functional is lq_functional else "bitsandbytes.nn"
        made = import_module(module).Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold
        )
        if self.functional is lq_functional:
            made.load_state_dict({"weight": weight.cpu()})
        else:
            made.weight = import_module(module).Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return made.to(weight.device).eval()


OURS = Library(lq_functional, lq_kernels.matmul, lq_kernels.matmul_4bit)

Prepare = Callable[[Library, Tensor, Tensor], Call]
Expected = Callable[[Tensor, Tensor], Tensor]


def theirs() -> dict[str, Library]:
    if find_spec("bitsandbytes") is None:
        return {}
    package = import_module("bitsandbytes")
    return {"bitsandbytes": Library(package.functional, package.matmul, package.matmul_4bit)}


@dataclass(frozen=True)
class Part:
    """`prepare` gives the call to be timed; `expected` what it returns, for so many rows, in float64."""

    name: str
    op: str
    prepare: Prepare
    expected: Expected
    relative: float
    bits_of_weight: float
    by_rows: bool = True  # else it is done once, to the weight
    peer: bool = True
    of_product: bool = True

    def case(self, device: torch.device, M: int, K: int, N: int) -> Case:
        def make() -> Inputs:
            x, weight = inputs(device, M, K, N)
            return x, weight, self.prepare(OURS, x, weight)

        def check(given: Inputs, out: Outputs) -> None:
            x, weight, _ = given
            whole = self.expected(x, weight)
            for some in ends(len(whole)):
                assert_close(out.reshape(whole.shape)[some], whole[some], self.relative)

        def peer(library: Library, x: Tensor, weight: Tensor, ours: Call) -> Call:
            return torch.no_grad()(self.prepare(library, x, weight))

        return Case(
            name=self.name,
            op=self.op,
            shape=f"{M} x {N} x {K}" if self.by_rows else f"{N} x {K}",
            dtype="fp16",
            make=make,
            ours=lambda x, weight, call: call(),
            check=check,
            bytes=int(N * K * self.bits_of_weight / 8) + (2 * M * (K + N) if self.by_rows else 0),
            operations=2 * M * N * K if self.of_product and M > 1 else 0,
            peers={name: partial(peer, library) for name, library in theirs().items()} if self.peer else {},
        )


def inputs(device: torch.device, M: int, K: int, N: int) -> tuple[Tensor, Tensor]:
    """x (M, K) normal with columns of outliers, W (N, K) Xavier-uniform, both float16."""
    x = torch.randn(M, K, device=device).clamp(-LARGEST_OTHER, LARGEST_OTHER)
    x[:, torch.randperm(K, device=device)[:OUTLIERS]] = OUTLIER
    return x.half(), torch.nn.init.xavier_uniform_(torch.empty(N, K, device=device)).half()


def _fp16(library: Library, x: Tensor, weight: Tensor) -> Call:
    return partial(F.linear, x, weight)


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().t()


def _quantize_4bit(library: Library, x: Tensor, weight: Tensor, double: bool) -> Call:
    def quantized() -> Tensor:
        return library.functional.quantize_nf4(weight, blocksize=BLOCK_SIZE, compress_statistics=double)[0]

    return quantized


def _packed_bytes(x: Tensor, weight: Tensor) -> Tensor:
    return lq_functional.quantize_nf4(weight.cpu(), blocksize=BLOCK_SIZE)[0].double()


def _matmul_4bit(library: Library, x: Tensor, weight: Tensor, double: bool) -> Call:
    packed, state = library.functional.quantize_nf4(weight, blocksize=BLOCK_SIZE, compress_statistics=double)
    return partial(library.matmul_4bit, x, packed.t(), state)


def _restored(x: Tensor, weight: Tensor, double: bool) -> Tensor:
    return lq_functional.dequantize_nf4(
        *lq_functional.quantize_nf4(weight, blocksize=BLOCK_SIZE, compress_statistics=double)
    ).double()


def _dequantize_4bit(library: Library, x: Tensor, weight: Tensor, double: bool) -> Call:
    packed, state = library.functional.quantize_nf4(weight, blocksize=BLOCK_SIZE, compress_statistics=double)
    return partial(library.functional.dequantize_nf4, packed, state)


def _exact_4bit(x: Tensor, weight: Tensor, double: bool) -> Tensor:
    return x.double() @ _restored(x, weight, double).t()


def _int8(library: Library, x: Tensor, weight: Tensor, threshold: float) -> Call:
    return partial(library.matmul, x, weight, threshold=threshold)


def _frozen(library: Library, x: Tensor, weight: Tensor, threshold: float) -> Call:
    return partial(library.layer(weight, threshold), x)


def _quantize_rows(library: Library, x: Tensor, weight: Tensor, of_weight: bool, threshold: float = 0.0) -> Call:
    def codes() -> Tensor:
        return library.functional.int8_vectorwise_quant(weight if of_weight else x, threshold=threshold)[0]

    return codes


def _codes_of(x: Tensor, weight: Tensor, of_weight: bool, threshold: float = 0.0) -> Tensor:
    return lq_functional.int8_vectorwise_quant((weight if of_weight else x).cpu(), threshold=threshold)[0].double()


def _codes(functional: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, stats, _ = functional.int8_vectorwise_quant(x)
    weight_codes, weight_stats, _ = functional.int8_vectorwise_quant(weight)
    return codes, weight_codes, stats, weight_stats


def _sums(library: Library, x: Tensor, weight: Tensor) -> Call:
    return partial(library.functional.int8_linear_matmul, *_codes(library.functional, x, weight)[:2])


def _exact_sums(x: Tensor, weight: Tensor) -> Tensor:
    codes, weight_codes, *_ = _codes(lq_functional, x, weight)
    return codes.double() @ weight_codes.double().t()


def _dequantize_sums(library: Library, x: Tensor, weight: Tensor) -> Call:
    codes, weight_codes, *stats = _codes(library.functional, x, weight)
    sums = library.functional.int8_linear_matmul(codes, weight_codes)
    return partial(library.functional.int8_mm_dequant, sums, *stats)


def parts() -> Iterator[Part]:
    """The eight products, and what belongs to them."""
    yield Part("B1", "fp16", _fp16, _exact, FP16_ERROR, 16, peer=False)
    for name, double in (("B2", False), ("B3", True)):
        kind = "nf4, double" if double else "nf4"
        multiply = partial(_matmul_4bit, double=double)
        yield Part(name, kind, multiply, partial(_exact_4bit, double=double), FP16_ERROR, 4.5)
        quantize = partial(_quantize_4bit, double=double)
        yield Part(name, f"{kind}: quantize W", quantize, _packed_bytes, 0.0, 20.5, by_rows=False, of_product=False)
        dequantize, restored = partial(_dequantize_4bit, double=double), partial(_restored, double=double)
        yield Part(
            name, f"{kind}: dequantize W", dequantize, restored, FP16_ERROR, 20.5, by_rows=False, of_product=False
        )
    for name, make, kind in (("B4", _int8, "int8"), ("B7", _frozen, "Linear8bitLt")):
        yield Part(name, kind, partial(make, threshold=0.0), _exact, INT8_ERROR, 8)
        outliers, name = partial(make, threshold=THRESHOLD), f"B{int(name[1]) + 1}"
        yield Part(name, f"{kind}, outliers", outliers, _exact, INT8_ERROR_WITHOUT_OUTLIERS, 8)
    yield Part("B6", "int8 sums alone", _sums, _exact_sums, 0.0, 8)
    yield from _parts_of_int8()


def _parts_of_int8() -> Iterator[Part]:
    of_weight, of_input = (partial(_quantize_rows, of_weight=which) for which in (True, False))
    weight_codes, codes = (partial(_codes_of, of_weight=which) for which in (True, False))
    yield Part("B4", "int8: quantize W", of_weight, weight_codes, 0.0, 24, by_rows=False, of_product=False)
    yield Part("B4", "int8: quantize x", of_input, codes, 0.0, 0, of_product=False)
    outliers, their_codes = partial(of_input, threshold=THRESHOLD), partial(codes, threshold=THRESHOLD)
    yield Part("B5", "int8, outliers: quantize x", outliers, their_codes, 0.0, 0, of_product=False)
    yield Part("B4", "int8: dequantize sums", _dequantize_sums, _exact, INT8_ERROR, 0, of_product=False)


@dataclass(frozen=True)
class MatmulBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU; `rows` of x, and the linear, of full ones; `only`
    cases whose name or op holds one of these words; about `seconds` for each time; `figure`: where the picture goes."""

    figure: str
    sizes: str = "auto"
    only: tuple[str, ...] = ()
    seconds: float = 0.1
    rows: tuple[int, ...] = (1, 8, 64, 512, 4096)
    in_features: int = 4096
    out_features: int = 14336

    def run(self, device: torch.device) -> Iterator[Result]:
        watch = Stopwatch(device, self.seconds)
        torch.manual_seed(0)
        full = self.sizes == "full" or (self.sizes == "auto" and device.type == "cuda")
        rows, K, N = (self.rows, self.in_features, self.out_features) if full else ((1, 8), 64, 96)
        ceilings = Ceilings.measured(watch, 2**31 if full else 2**16, 8192 if full else 64)
        yield from of_ceilings(ceilings)
        results = []
        for part in parts():
            for M in rows if part.by_rows else rows[:1]:
                if not self.only or any(word in f"{part.name} {part.op}" for word in self.only):
                    results.append(measure_verified(part.case(device, M, K, N), watch, ceilings))
                    yield results[-1]
        draw([result.record() for result in results], Path(self.figure))


def measure_verified(case: Case, watch: Stopwatch, ceilings: Ceilings) -> Result:
    """`measure`, and a comparison of the last result that was timed."""
    last: list[tuple[Inputs, Outputs]] = []

    def ours(*given: Any) -> Outputs:
        out = case.ours(*given)
        last[:] = [(given, out)]
        return out

    result = measure(replace(case, ours=torch.no_grad()(ours)), watch, ceilings)
    if result.problem is None:
        try:
            case.check(*last[0])
        except AssertionError as error:
            return replace(result, ms=None, problem=f"the last result that was timed: {error}")
    return result
