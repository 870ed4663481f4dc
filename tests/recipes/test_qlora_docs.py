"""QLoRA without a download, on a GPT small enough for a test."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lq_plugin.recipes.finetune import main
from lq_plugin.recipes.tasks.gpt import GPT
from lq_plugin.recipes.tasks.gpt_finetune import Pretraining
from lq_plugin.recipes.tasks.topics import TopicsText

SMALL = ["model.width=32", "model.depth=1", "model.heads=2", "model.context=32", "model.lora.r=4", "lr=1e-2"]
SHORT = ["trainer.max_steps=12", "trainer.val_check_interval=6", "data.validation_windows=8", "data.batch_size=4"]
PRETRAINING = ["model.pretraining.steps=30", "model.pretraining.batch_size=4"]
REST = ["callbacks.sample.length=5", "trainer.accelerator=cpu", "logger=csv", "trainer.log_every_n_steps=3"]


def test_topics_are_held_out_by_name_and_windows_do_not_depend_on_the_seed():
    data = TopicsText(context=64, batch_size=4, seed=0)
    training, held_out = bytes(data._training.text), bytes(data._validation.text)
    assert 0.02 < len(held_out) / (len(training) + len(held_out)) < 0.3
    assert b"Unpacking" in training + held_out
    assert bytes(TopicsText(context=64, batch_size=4, seed=1)._validation.text) == held_out
    with pytest.raises(ValueError, match=r"\d topics hold \d+ bytes, 4 windows of 64 need more"):
        TopicsText(context=64, batch_size=4, validation_share=0.0)


def test_pretraining_learns_and_repeats(tmp_path, sources):
    weights = []
    for number in range(2):
        torch.manual_seed(3)
        model = GPT(vocabulary=256, width=16, depth=1, heads=2, context=16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        file = tmp_path / f"{number}.safetensors"
        Pretraining([str(sources)], 3, 1e-2, 2, str(file)).run(model, 16, torch.device("cpu"))
        weights.append(load_file(file))
        assert not torch.equal(before["lm_head.weight"], weights[-1]["lm_head.weight"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.integration
def test_the_frozen_gpt_learns_the_manual(tmp_path, sources, monkeypatch, capsys):
    for package in ("pytorch", "fabric"):
        monkeypatch.setattr(logging.getLogger(f"lightning.{package}"), "propagate", False)
    common = ["experiment=qlora_docs", *SMALL, *SHORT, *PRETRAINING, *REST, f"model.pretraining.roots=[{sources}]"]
    folder = tmp_path / "run"

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lq-finetune", *common, *overrides])
        main()
        return capsys.readouterr().out

    printed = run(f"hydra.run.dir={folder}")
    assert "learning Python: step 30/30" in printed
    before = float(re.search(r"before training: val/bits_per_byte (\d+\.\d+)", printed)[1])
    after = float(re.search(r"finished after 12 steps, (\d+\.\d+) bits per byte", printed)[1])
    assert after < before - 0.1
    assert (folder / "sample.txt").read_text(errors="replace").startswith("The for statement")
    assert json.loads((folder / "adapter" / "lq_base.json").read_text())["linear"] == "nf4"
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.endswith("lm_head.weight") for name in state)
    resumed = run(f"hydra.run.dir={folder}", "resume=auto", "trainer.max_steps=14")
    assert "learning Python" not in resumed, "the pre-trained weights are there"
    assert "finished after 14 steps" in resumed
    weights = load_file(folder / "pretrained.safetensors")
    assert weights["lm_head.weight"].shape == (256, 32)
    assert Path(folder / "training.png").exists()
