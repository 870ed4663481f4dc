"""`benchmark=generation`: greedy decoding with a KV cache through transformers, frozen in NF4, beside bfloat16 and
bitsandbytes: one model shape, random weights that are the same for all three.

A step writes one token for each row of the batch; its time is that of `generate`, the prompt included, over the steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.recipes.benchmarks.records import Result

ALLOWED_DIFFERENCE = 0.05  # of the largest logit: the codes are the same, products are rounded to 16 bits on the way
SEED = 0


@dataclass(frozen=True)
class ModelShape:
    """Of a Llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


FULL = ModelShape("Llama 8B", 4096, 14336, 32, 32, 8, 128256)
SMALL = ModelShape("tiny Llama", 64, 128, 2, 4, 2, 256)


@dataclass(frozen=True)
class GenerationBenchmark:
    """sizes: "full", "small", or "auto" for full ones on a GPU. batches: rows that are written at once. prompt, length:
    tokens before and after. repeat: the best of so many is taken, after one to warm up.
    """

    sizes: str = "auto"
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    length: int = 64
    repeat: int = 2

    def run(self, device: torch.device) -> Iterator[Result]:
        full = self.sizes == "full" or (self.sizes == "auto" and device.type == "cuda")
        shape = FULL if full else SMALL
        torch.manual_seed(SEED)
        prompts = torch.randint(3, shape.vocabulary, (max(self.batches), self.prompt), device=device)
        seconds: dict[str, dict[int, float]] = {}
        logits: dict[str, Tensor] = {}
        problems: dict[str, str] = {}
        weights = 0
        for name, change in CHANGES.items():
            model = llama(shape, device)
            weights = weights or sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
            try:
                model = change(model)
                logits[name] = _last_logits(model, prompts[:1])
                seconds[name] = {batch: self._seconds(model, prompts[:batch]) for batch in self.batches}
            except (ImportError, RuntimeError, ValueError) as error:
                problems[name] = str(error)
            del model
        yield from self._results(shape, weights, seconds, _disagreement(logits, problems), problems)

    def _results(
        self,
        shape: ModelShape,
        weights: int,
        seconds: dict[str, dict[int, float]],
        problem: str | None,
        problems: dict[str, str],
    ) -> Iterator[Result]:
        for batch in self.batches:
            ms = {name: times[batch] / self.length * 1e3 for name, times in seconds.items()}
            ours = ms.pop("nf4", None) if problem is None else None
            yield Result(
                name="gen",
                op="generate, nf4",
                shape=f"{shape.name}, batch {batch}",
                dtype="bfloat16",
                bytes=weights // 2,
                ms=ours,
                spread=0.0 if ours else None,
                peers=ms if ours else {},
                peer_problems={name: text for name, text in problems.items() if name != "nf4"},
                more={"tokens_per_second": batch / ours * 1e3} if ours else {},
                problem=problem or problems.get("nf4"),
            )

    def _seconds(self, model: nn.Module, prompts: Tensor) -> float:
        """Of the fastest run."""
        times = []
        for _ in range(1 + self.repeat):
            _wait(prompts.device)
            began = perf_counter()
            generate(model, prompts, self.length)
            _wait(prompts.device)
            times.append(perf_counter() - began)
        return min(times[1:])


@torch.no_grad()
def generate(model: Any, prompts: Tensor, length: int) -> Tensor:
    """prompts (B, P) -> (B, P + length), the likeliest tokens."""
    mask = torch.ones_like(prompts)
    return model.generate(
        input_ids=prompts,
        attention_mask=mask,
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def llama(shape: ModelShape, device: torch.device) -> nn.Module:
    """transformers' Llama in bfloat16 with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # an argument of its base class
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(SEED)
    try:
        with device:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _plain(model: nn.Module) -> nn.Module:
    return model


def _ours(model: nn.Module) -> nn.Module:
    from lq_plugin import convert

    convert(model, "nf4")
    return model


def _bitsandbytes(model: nn.Module) -> nn.Module:
    """Every linear but the output layer, as transformers' BitsAndBytesConfig does."""
    import bitsandbytes as bnb

    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for name, linear in found:
        parent_name, _, child = name.rpartition(".")
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        packed: Any = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4"
        )
        new.weight = packed.to(linear.weight.device)
        setattr(model.get_submodule(parent_name), child, new)
    return model


# What is timed, in this order; nf4 is ours, the others are its peers.
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {"bf16": _plain, "bitsandbytes": _bitsandbytes, "nf4": _ours}


@torch.no_grad()
def _last_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits[:, -1].float()


def _disagreement(logits: dict[str, Tensor], problems: dict[str, str]) -> str | None:
    """Why ours is not to be timed: it does not compute what bitsandbytes computes."""
    if "nf4" not in logits or "bitsandbytes" not in logits:
        return problems.get("nf4")
    difference = (logits["nf4"] - logits["bitsandbytes"]).abs().max() / logits["bitsandbytes"].abs().max()
    if difference <= ALLOWED_DIFFERENCE:
        return None
    return f"logits differ from bitsandbytes' by {float(difference):.1%} of the largest"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
