"""Texts that a transformers causal language model writes, with its KV cache: greedy or drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.recipes.tasks.encoding import Encoder


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy: always the likeliest token. top_k, top_p: draw among the k likeliest, or those that
    hold this probability; None for all.
    """

    length: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.temperature < 0:
            raise ValueError(
                f"length must be at least 1 and temperature not negative, got {self.length} and {self.temperature}"
            )

    def arguments(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k or 0,
            "top_p": self.top_p or 1.0,
        }


@dataclass(frozen=True)
class Written:
    """tokens: what was written after each prompt, without padding. seconds: of all steps, the prompts included."""

    tokens: list[list[int]]
    steps: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


@torch.no_grad()
def write(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling) -> Written:
    """Prompts of token numbers -> what the model writes after them, until the end-of-text token or `length` tokens.

    The same for the same weights, prompts and seed. Random generators are left as they were.
    """
    if not prompts or not all(prompts):
        raise ValueError("there is no prompt, or an empty one: a model continues at least one token")
    device = next(model.parameters()).device
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    inputs, mask = left_padded(prompts, pad, device)
    training = model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        _wait(device)
        began = perf_counter()
        out = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=sampling.length,
            pad_token_id=pad,
            eos_token_id=_ends(model, tokenizer),
            use_cache=True,
            **sampling.arguments(),
        )
        _wait(device)
    seconds = perf_counter() - began
    model.train(training)
    written = out[:, inputs.shape[1] :].tolist()
    ends = _ends(model, tokenizer)
    return Written([_until(row, ends) for row in written], out.shape[1] - inputs.shape[1], seconds)


def answer(model: nn.Module, encoder: Encoder, question: str, sampling: Sampling) -> str:
    """What the model writes after a question in its chat template, or after the text itself where it has none."""
    has_template = encoder.plain or getattr(encoder.tokenizer, "chat_template", None)
    messages = [{"role": "user", "content": question}]
    prompt = encoder.prompt(messages) if has_template else encoder.text_prompt(question)
    written = write(model, encoder.tokenizer, [prompt], sampling).tokens[0]
    return encoder.tokenizer.decode(written, skip_special_tokens=True)


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers and attention mask, each (B, T) int64, that end where the prompts end."""
    length = max(map(len, prompts))
    rows = [[pad] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's folder names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in known if token is not None})


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    """Without what follows the first end, and without it."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
