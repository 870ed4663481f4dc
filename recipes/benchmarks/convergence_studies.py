"""What `benchmark=convergence` compares: variants of one training run, each with the variant that it is held against.

A variant and what it is held against differ in one thing; data order, initial weights, learning rate and clipping are
the same. `limit` is the largest difference, in percent of the bits per byte, that may lie inside the interval of a
variant that "trains as well".
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

HALF_8BIT_LIMIT = 0.3  # percent: 8-bit Adam, and products of which the weight gradient is in 16 bits
ALL_8BIT_LIMIT = 0.6  # percent: e4m3 state, and all three products in 8 bits
PERCENTILE = 5
LR_FACTORS = (0.25, 0.5, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Variant:
    """A name and how it trains. `linear`: a format of lq_plugin.convert; `weights`: the dtype that parameters have.

    lr_factor multiplies the learning rate of the algorithm. against: the name of the variant it is held against.
    """

    name: str
    algorithm: str = "AdamW"
    state: str = "32bit"
    linear: str | None = None
    percentile: int | None = None
    weights: str = "float32"
    stochastic_rounding: bool = False
    master_weights: str | None = None
    lr_factor: float = 1.0
    against: str | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Size:
    """The model, and how long it trains: `batch_size` windows of `context` bytes at each step."""

    width: int
    depth: int
    heads: int
    context: int
    batch_size: int
    steps: int
    warmup_steps: int
    validation_windows: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context


@dataclass(frozen=True)
class Study:
    variants: tuple[Variant, ...]
    size: Size
    seeds: int


SMALL = Size(width=32, depth=1, heads=2, context=32, batch_size=4, steps=6, warmup_steps=2, validation_windows=8)

TORCH = Variant("torch AdamW", "torch.AdamW")
OTHERS = ("Lion", "SGD", "Adagrad", "RMSprop", "AdEMAMix", "LAMB", "LARS", "Muon")


def _optimizers() -> Iterator[Variant]:
    yield TORCH
    yield Variant("AdamW 32bit", against=TORCH.name, limit=HALF_8BIT_LIMIT)
    states = (("8bit", HALF_8BIT_LIMIT), ("fp8", ALL_8BIT_LIMIT))
    for state, limit in states:
        yield Variant(f"AdamW {state}", state=state, against=TORCH.name, limit=limit)
    clipped = Variant("AdamW 32bit, percentile 5", percentile=PERCENTILE)
    yield clipped
    for state, limit in states:
        name = f"AdamW {state}, percentile 5"
        yield replace(clipped, name=name, state=state, against=clipped.name, limit=limit)
    yield from _bfloat16_weights()
    for algorithm in OTHERS:
        yield Variant(f"{algorithm} 32bit", algorithm)
        yield Variant(f"{algorithm} 8bit", algorithm, state="8bit", against=f"{algorithm} 32bit", limit=HALF_8BIT_LIMIT)
    yield from _sweep((TORCH, Variant("AdamW 8bit", state="8bit", against=TORCH.name)), LR_FACTORS)


def _bfloat16_weights() -> Iterator[Variant]:
    """The bits that bfloat16 weights lack kept in float32, in a byte, by chance, or not at all."""
    exact = Variant("AdamW 32bit, bf16 weights, master 32bit", weights="bfloat16", master_weights="32bit")
    yield exact
    less = replace(exact, state="8bit", master_weights=None, against=exact.name)
    yield replace(less, name="AdamW 8bit, bf16 weights, master 8bit", master_weights="8bit", limit=HALF_8BIT_LIMIT)
    yield replace(less, name="AdamW 8bit, bf16 weights, stochastic rounding", stochastic_rounding=True)
    yield replace(less, name="AdamW 8bit, bf16 weights, nearest")


FORMAT_LIMITS = {
    "int8_switchback": HALF_8BIT_LIMIT,
    "int8_switchback_vectorwise": HALF_8BIT_LIMIT,
    "int8_switchback_mem_efficient": ALL_8BIT_LIMIT,  # its weight gradient reads int8 codes of the input
    "int8_rowwise": ALL_8BIT_LIMIT,
    "fp8_tensorwise": ALL_8BIT_LIMIT,
    "fp8_rowwise": ALL_8BIT_LIMIT,
    "fp8_rowwise_with_gw_hp": HALF_8BIT_LIMIT,
}
SWEPT_FORMATS = ("int8_switchback", "int8_rowwise", "fp8_tensorwise", "fp8_rowwise_with_gw_hp")
FORMAT_LR_FACTORS = (4.0, 8.0, 16.0)


def _formats() -> Iterator[Variant]:
    exact = Variant("16-bit", "torch.AdamW")
    yield exact
    variants = {
        name: replace(exact, name=name, linear=name, against=exact.name, limit=limit)
        for name, limit in FORMAT_LIMITS.items()
    }
    yield from variants.values()
    yield from _sweep((exact, *(variants[name] for name in SWEPT_FORMATS)), FORMAT_LR_FACTORS)


def _sweep(variants: tuple[Variant, ...], factors: tuple[float, ...]) -> Iterator[Variant]:
    """Each variant at each learning rate, held against the other's run at the same one."""
    for factor in factors:
        for variant in variants:
            against = None if variant.against is None else swept_name(variant.against, factor)
            name = swept_name(variant.name, factor)
            yield replace(variant, name=name, lr_factor=factor, against=against, limit=None)


def swept_name(name: str, factor: float) -> str:
    return f"{name}, lr x{factor:g}"


STUDIES = {
    "optimizers": Study(
        tuple(_optimizers()),
        Size(512, 8, 8, context=512, batch_size=16, steps=300, warmup_steps=30, validation_windows=512),
        seeds=5,
    ),
    "formats": Study(
        tuple(_formats()),
        Size(768, 12, 12, context=512, batch_size=16, steps=300, warmup_steps=30, validation_windows=512),
        seeds=5,
    ),
}
