"""What `benchmark=training_steps` measures: shapes of models, and who trains them in which way."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, input and output embedding not tied, and the batch of a step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    length: int
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def parameters(self) -> int:
        """Of the model, whatever its weights are kept in, without adapters."""
        attention = 2 * self.hidden * (self.heads + self.key_value_heads) * (self.hidden // self.heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "E1": Shape(2048, 8192, 16, 32, 8, 128256, 8, 2048),
    "E2": Shape(4096, 14336, 32, 32, 8, 128256, 2, 2048, checkpointing=True),
    "E3": Shape(4096, 14336, 32, 32, 8, 128256, 4, 2048, checkpointing=True),
    "E3, one row": Shape(4096, 14336, 32, 32, 8, 128256, 1, 2048),
    "E4": Shape(8192, 28672, 80, 64, 8, 128256, 1, 4096, checkpointing=True),
}
SMALL = {
    "E1": Shape(64, 128, 2, 4, 2, 256, 2, 32),
    "E2": Shape(64, 128, 2, 4, 2, 256, 1, 32, checkpointing=True),
    "E3": Shape(64, 128, 2, 4, 2, 256, 2, 32, checkpointing=True),
    "E3, one row": Shape(64, 128, 2, 4, 2, 256, 1, 32),
    "E4": Shape(128, 192, 2, 4, 2, 256, 1, 48, checkpointing=True),
}


@dataclass(frozen=True)
class Case:
    """A model, an optimizer with its options, and how the linears multiply.

    optimizer: "torch", "bitsandbytes" or "ours". linear: a format of lq_plugin.convert. torchao_recipe: of its
    float8 training, or "int8_mixed_precision". loss: "transformers", its own, or "chunked", of which no logits of all
    tokens exist at once.

    lora: None trains all weights. "ours", and "peft", "peft_autocast", "peft_prepared" of training_steps_lora, train
    adapters beside linears that are frozen in the format `linear`: by bitsandbytes for PEFT, where None leaves them in
    bfloat16. compute: "int8" or "fp8", in which our frozen linears multiply.
    """

    name: str
    what: str
    shape: Shape
    optimizer: str = "torch"
    options: dict[str, Any] = field(default_factory=dict)
    linear: str | None = None
    torchao_recipe: str | None = None
    compiled: bool = False
    loss: str = "transformers"
    lora: str | None = None
    compute: str | None = None


def cases(shapes: dict[str, Shape]) -> Iterator[Case]:
    """E2's optimizers first, which is also M1, then formats and adapters beside their peers, eager and compiled; E4,
    which is also M2, eager."""
    yield from _optimizers(shapes["E2"])
    for compiled in (False, True):
        for name in ("E1", "E2"):
            yield from (_mode(case, compiled) for case in _formats(name, shapes[name]))
    for compiled in (False, True):
        for name in ("E3", "E3, one row"):
            yield from (_mode(case, compiled) for case in _adapters(shapes[name]))
    yield from (_mode(case, compiled=False) for case in _large_adapters(shapes["E4"]))


def _mode(case: Case, compiled: bool) -> Case:
    return replace(case, what=f"{case.what}, {'compiled' if compiled else 'eager'}", compiled=compiled)


def _optimizers(shape: Shape) -> Iterator[Case]:
    ours = Case("M1", "ours AdamW8bit, default", shape, "ours")
    yield Case("M1", "torch AdamW", shape)
    yield Case("M1", "bitsandbytes AdamW8bit", shape, "bitsandbytes")
    yield ours
    for what, options in (
        ("8-bit embedding state", {"embedding_state": "8bit"}),
        ("gradient release", {"gradient_release": True}),
        ("gradient release, 8-bit embedding state", {"gradient_release": True, "embedding_state": "8bit"}),
    ):
        yield replace(ours, what=f"ours AdamW8bit, {what}", options=options)
    yield replace(ours, what="ours PagedAdamW8bit", options={"offload": True})
    for embeddings, options in (("", {}), (", 8-bit embedding state", {"embedding_state": "8bit"})):
        what = f"ours, gradient release, chunked loss{embeddings}"
        yield replace(ours, what=what, options={"gradient_release": True, **options}, loss="chunked")


OUR_FORMATS = ("int8_switchback", "int8_rowwise", "fp8_tensorwise", "fp8_rowwise_with_gw_hp")
TORCHAO_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "int8_mixed_precision")


def _formats(name: str, shape: Shape) -> Iterator[Case]:
    """Plain torch, torchao with torch's optimizer, bitsandbytes' optimizer, and ours with our optimizer."""
    plain = Case(name, "torch bf16 + torch AdamW", shape)
    yield plain
    yield replace(plain, what="torch bf16 + bitsandbytes AdamW8bit", optimizer="bitsandbytes")
    for recipe in TORCHAO_RECIPES:
        yield replace(plain, what=f"torchao {recipe} + torch AdamW", torchao_recipe=recipe)
    yield replace(plain, what="torch bf16 + our AdamW8bit", optimizer="ours")
    for linear in OUR_FORMATS:
        ours = replace(plain, what=f"our {linear} + our AdamW8bit", optimizer="ours", linear=linear)
        yield ours
        yield replace(ours, what=f"{ours.what}, chunked loss", loss="chunked")


# What a base is frozen in, and in what it multiplies.
OUR_BASES = (("nf4_dq", None), ("nf4", None), ("nf4", "fp8"), ("nf4", "int8"), ("llm_int8", None))


def _adapters(shape: Shape) -> Iterator[Case]:
    """QLoRA and LLM.int8(): PEFT on bitsandbytes' layers and on bfloat16, then ours with either loss."""
    for base in ("nf4_dq", "nf4", "llm_int8", None):
        yield _peft(base, shape)
    yield _peft("nf4_dq", shape, "autocast")
    yield _peft("nf4_dq", shape, "prepared")
    for base, compute in OUR_BASES:
        yield from _ours(base, compute, shape)


def _large_adapters(shape: Shape) -> Iterator[Case]:
    """What is left of that for 70B."""
    both = [_peft("nf4_dq", shape), *_ours("nf4_dq", None, shape), *_ours("nf4_dq", "fp8", shape)]
    yield from (replace(case, name="E4") for case in both)


def _peft(base: str | None, shape: Shape, way: str = "") -> Case:
    """way: "" casts adapters to bfloat16, see training_steps_lora for the others."""
    who = "PEFT, bf16 base" if base is None else f"PEFT + bitsandbytes {base}"
    what = ", ".join(filter(None, (who, way, f"{shape.batch} x {shape.length}")))
    return Case("E3", what, shape, "bitsandbytes", linear=base, lora="_".join(filter(None, ("peft", way))))


def _ours(base: str, compute: str | None, shape: Shape) -> Iterator[Case]:
    who = f"our {base}" if compute is None else f"our {base} in {compute}"
    sizes = f"{shape.batch} x {shape.length}"
    plain = Case("E3", f"{who}, {sizes}", shape, "ours", linear=base, lora="ours", compute=compute)
    yield replace(plain, what=f"{who}, chunked loss, {sizes}", loss="chunked")
    yield plain
