"""`train(...)` runs the recipe in this process, on a tiny model and a few files; tiny models of transformers."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from lq_plugin.recipes.train import main

TINY = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", "data.batch_size=2"]
SHORT = ["trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=2"]
ARTEFACTS = ["data.validation_windows=4", "callbacks.checkpoints.every_n_train_steps=2", "callbacks.sample.length=5"]


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
}


@dataclass(frozen=True)
class Run:
    """The output folder of a run and what it printed."""

    folder: Path
    printed: str


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of Python files, twenty of which are long enough for validation to get some."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(40):
        (folder / f"module_{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 5)
    return folder


@pytest.fixture
def train(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """train(override, ...) -> Run; each run has its own output folder below tmp_path/outputs."""
    monkeypatch.chdir(tmp_path)
    # As in a process of its own; imported where logging is set up already, Lightning hands its messages on to Hydra.
    for package in ("pytorch", "fabric"):
        monkeypatch.setattr(logging.getLogger(f"lightning.{package}"), "propagate", False)
    runs = iter(range(100))

    def run(*overrides: str, tiny: bool = True) -> Run:
        folder = tmp_path / "outputs" / f"run_{next(runs)}"
        small = [*TINY, *SHORT, *ARTEFACTS, "trainer.accelerator=cpu", f"data.roots=[{sources}]"] if tiny else []
        monkeypatch.setattr(sys, "argv", ["lq-train", f"hydra.run.dir={folder}", "logger=csv", *small, *overrides])
        main()
        return Run(folder, capsys.readouterr().out)

    return run


def _tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """Bytes and a few merges, trained here; <|end|> ends a turn and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["what is the colour of the sky ? it is blue", "the number after one is two"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>")
    made.chat_template = chat_template
    return made


def _save_llama(folder: Path, chat_template: str | None = CHAT_TEMPLATE, **settings) -> Path:
    """A Llama with random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = _tokenizer(chat_template)
    sizes = {**TINY_LLAMA, "vocab_size": len(words), "eos_token_id": words.eos_token_id, **settings}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(chat_template=...) -> a tokenizer of transformers."""
    return _tokenizer


@pytest.fixture(scope="session")
def save_llama():
    """save_llama(folder, chat_template=..., **settings) -> the folder, with a model and its tokenizer in it."""
    return _save_llama
