"""Perplexity, bits per byte and exact match of a causal language model on held-out samples."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lq_plugin.layers.causal_lm import causal_lm_loss
from lq_plugin.layers.chunked_cross_entropy import IGNORE_INDEX
from lq_plugin.recipes.tasks.causal_lm import perplexity
from lq_plugin.recipes.tasks.encoding import Encoder
from lq_plugin.recipes.tasks.samples import Dialogue, Sample
from lq_plugin.recipes.tasks.text_data import encode_all
from lq_plugin.recipes.tasks.token_rows import TokenRows
from lq_plugin.recipes.tasks.writing import Sampling, write

Figures = dict[str, float | int]


@torch.no_grad()
def likelihood(model: nn.Module, encoder: Encoder, samples: list[Sample], *, context: int, batch_size: int) -> Figures:
    """samples, tokens (those that are learned), loss in nats per token, perplexity, and bits per byte.

    Bytes are those of the text that the tokens stand for, in UTF-8; special tokens have none, and their loss counts.
    Samples that are longer than the context go on in another row, answers are cut; ValueError if no token is left.
    """
    sequences, notes = encode_all(samples, encoder, context, "auto")
    if not sequences:
        raise ValueError(f"none of the {len(samples)} samples has a token to learn in its first {context}{notes}")
    rows = TokenRows.of(sequences, context, packing=False, seed=0)
    device = next(model.parameters()).device
    nats, tokens, size = 0.0, 0, 0
    for numbers in torch.arange(len(rows)).split(batch_size):
        batch = rows.batch(numbers)
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        tokens_and_labels = (on_device.pop("input_ids"), on_device.pop("labels"))
        nats += float(causal_lm_loss(model, *tokens_and_labels, reduction="sum", **on_device))  # type: ignore[arg-type]
        tokens += int((batch["labels"] != IGNORE_INDEX).sum())
        size += sum(_bytes(encoder, row) for row in batch["labels"])
    loss = nats / tokens
    return {
        "samples": len(samples),
        "tokens": tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": nats / math.log(2) / max(1, size),
    }


def exact_match(model: nn.Module, encoder: Encoder, samples: list[Sample], *, length: int, batch_size: int) -> Figures:
    """answers: how many dialogues there are; exact_match: the share of last answers that greedy decoding writes.

    White space around an answer does not count. Nothing without a dialogue among the samples.
    """
    dialogues = [sample for sample in samples if isinstance(sample, Dialogue)]
    if not dialogues:
        return {}
    right = 0
    for chosen in _batches(dialogues, batch_size):
        turns = [_last_answer(dialogue) for dialogue in chosen]
        prompts = [encoder.prompt(messages) for messages, _ in turns]
        written = write(model, encoder.tokenizer, prompts, Sampling(length)).tokens
        texts = [encoder.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        right += sum(text.strip() == answer.strip() for text, (_, answer) in zip(texts, turns, strict=True))
    return {"answers": len(dialogues), "exact_match": right / len(dialogues)}


def _last_answer(dialogue: Dialogue) -> tuple[list[dict[str, str]], str]:
    """The messages before the last answer, and this answer."""
    place = max((i for i, m in enumerate(dialogue.messages) if m["role"] == "assistant"), default=None)
    if place is None:
        raise ValueError("a dialogue without an answer: none of its messages has the role 'assistant'")
    return list(dialogue.messages[:place]), dialogue.messages[place]["content"]


def _bytes(encoder: Encoder, labels: Tensor) -> int:
    learned = labels[labels != IGNORE_INDEX].tolist()
    return len(encoder.tokenizer.decode(learned, skip_special_tokens=True).encode())


def _batches(dialogues: list[Dialogue], size: int) -> Iterator[list[Dialogue]]:
    for begin in range(0, len(dialogues), size):
        yield dialogues[begin : begin + size]
