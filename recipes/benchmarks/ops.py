"""`benchmark=ops`: every op that has a goal, at the sizes of the goal, beside others that do the same work."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lq_plugin.recipes.benchmarks.cases import Case, measure, of_ceilings
from lq_plugin.recipes.benchmarks.cases_4bit import Weight, four_bit_cases
from lq_plugin.recipes.benchmarks.cases_blockwise import blockwise_cases
from lq_plugin.recipes.benchmarks.cases_products import Size, product_cases
from lq_plugin.recipes.benchmarks.cases_rowwise import rowwise_cases
from lq_plugin.recipes.benchmarks.records import Result
from lq_plugin.recipes.benchmarks.timing import Ceilings, Stopwatch


@dataclass(frozen=True)
class Sizes:
    """Rows and columns; (M, N, K); (tokens, in_features, out_features); (in_features, out_features) of 4-bit
    weights, rows of a small batch, tokens of a large one; what the ceilings are measured on."""

    blockwise: tuple[int, int]
    rowwise: tuple[int, int]
    products: list[Size]
    linears: list[Size]
    weights: list[Weight]
    rows: list[int]
    tokens: list[int]
    copied_bytes: int
    product_side: int


FULL = Sizes(
    blockwise=(65536, 4096),
    rowwise=(32768, 4096),
    products=[(8192, 8192, 8192), (32768, 4096, 1024), (32768, 16384, 4096), (8192, 14336, 4096)],
    linears=[(32768, 1024, 4096), (32768, 4096, 16384)],
    weights=[(4096, 14336), (14336, 4096), (8192, 28672)],
    rows=[1, 2, 4, 8, 16, 32, 64, 128],
    tokens=[512, 2048, 8192],
    copied_bytes=2**31,
    product_side=8192,
)
SMALL = Sizes((16, 512), (32, 256), [(32, 64, 48)], [(32, 64, 96)], [(64, 96)], [1, 8], [32, 48], 2**16, 64)


@dataclass(frozen=True)
class OpBenchmark:
    """`sizes`: "full", "small", or "auto" for full ones on a GPU; `only` cases whose name or op holds one of these
    words; about `seconds` for each time."""

    sizes: str = "auto"
    only: tuple[str, ...] = ()
    seconds: float = 0.1

    def run(self, device: torch.device) -> Iterator[Result]:
        watch = Stopwatch(device, self.seconds)
        sizes = {"full": FULL, "small": SMALL, "auto": FULL if device.type == "cuda" else SMALL}[self.sizes]
        torch.manual_seed(0)
        ceilings = Ceilings.measured(watch, sizes.copied_bytes, sizes.product_side)
        yield from of_ceilings(ceilings)
        for case in self._cases(device, sizes):
            if not self.only or any(word in f"{case.name} {case.op}" for word in self.only):
                yield measure(case, watch, ceilings)

    def _cases(self, device: torch.device, sizes: Sizes) -> Iterator[Case]:
        yield from blockwise_cases(device, *sizes.blockwise)
        yield from rowwise_cases(device, *sizes.rowwise)
        yield from product_cases(device, sizes.products, sizes.linears)
        yield from four_bit_cases(device, sizes.weights, sizes.rows, sizes.tokens)
