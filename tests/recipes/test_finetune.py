"""From a folder with a Llama-like model to a merged, evaluated checkpoint in four commands, each run here."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lq_plugin.recipes.evaluate import main as evaluate
from lq_plugin.recipes.export import main as export
from lq_plugin.recipes.finetune import main as finetune
from lq_plugin.recipes.generate import main as generate

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

WORDS = ("one", "two", "sky", "blue")
SHORT = ["trainer.val_check_interval=10", "trainer.log_every_n_steps=5", "callbacks.checkpoints.every_n_train_steps=10"]
DATA = ["data.context=64", "data.batch_size=4", "trainer.accelerator=cpu", "logger=csv"]
TRAINING = [*SHORT, *DATA, "callbacks.sample.length=8", "callbacks.sample.temperature=0", "lr=5e-3"]


def run(main, folder: Path, *overrides: str) -> None:
    """A command in this process, with its output folder."""
    with pytest.MonkeyPatch.context() as patch:
        for package in ("pytorch", "fabric"):
            patch.setattr(logging.getLogger(f"lightning.{package}"), "propagate", False)
        patch.setattr(sys, "argv", ["lq", f"hydra.run.dir={folder}", *overrides])
        main()


@pytest.fixture(scope="module")
def place(tmp_path_factory, save_llama) -> Path:
    """A folder with a model and a file of questions, each of which has one of four answers."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_llama(folder / "model", initializer_range=0.1)
    records = [{"question": f"{word} ?", "answer": f"it is {word}"} for word in WORDS * 16]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """lq-finetune."""
    model_and_data = [f"model.source={place}/model", f"data.source={place}/data.jsonl"]
    sample = ["callbacks.sample.prompt=two ?", "trainer.max_steps=50"]
    run(finetune, place / "run", "experiment=qlora_hf", *model_and_data, *TRAINING, *sample)
    return place / "run"


@pytest.fixture(scope="module")
def merged(place, trained) -> Path:
    """lq-export."""
    run(export, place / "export", f"adapter={trained}/adapter", f"output={place}/merged", "dtype=float32", "device=cpu")
    return place / "merged"


def figures(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def evaluated(place: Path, name: str, *model: str) -> dict:
    """lq-evaluate."""
    data = [f"test={place}/data.jsonl", "context=64", "limit=8", "answers=4", "length=8", "device=cpu"]
    run(evaluate, place / name, *model, *data)
    return figures(place / name)


def test_a_run_leaves_its_artefacts_and_an_answer(trained):
    for name in ("checkpoints/last.ckpt", "metrics/metrics.csv", "training.png", "adapter/adapter_model.safetensors"):
        assert (trained / name).exists(), name
    assert (trained / "sample.txt").read_text() == "two ?\n\nit is two"
    assert json.loads((trained / "adapter" / "lq_base.json").read_text())["linear"] == "nf4"


def test_a_checkpoint_holds_what_is_trained_only(trained):
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(name.endswith("q_proj.lora_A") for name in state)
    assert not any(name.endswith(("base_layer.weight", "embed_tokens.weight")) for name in state)


def test_the_merged_model_answers_and_scores_as_the_adapted_one(place, trained, merged):
    adapted = evaluated(place, "of_adapter", f"adapter={trained}/adapter")
    whole = evaluated(place, "of_merged", f"source={merged}")
    assert adapted["exact_match"] == whole["exact_match"] == 1.0
    assert whole["loss"] == pytest.approx(adapted["loss"], rel=1e-3)
    base = evaluated(place, "of_base", f"source={place}/model")
    assert base["exact_match"] == 0.0
    assert base["loss"] > 4 * whole["loss"]
    assert whole["perplexity"] < 3 < base["bits_per_byte"]


def test_the_merged_model_is_transformers_own(place, merged):
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert type(model) is transformers.LlamaForCausalLM
    before = load_file(place / "model" / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.allclose(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_the_merged_model_writes(place, merged, capsys):
    answers = place / "answers.txt"
    run(generate, place / "written", f"source={merged}", "prompt=[sky ?,one ?]", "length=8", f"output={answers}")
    printed = capsys.readouterr().out
    assert re.search(r"\d+ tokens in \d+\.\d+ s: \d+\.\d tokens/s", printed)
    assert answers.read_text() == "it is sky\n\nit is one\n"


def test_drawn_answers_repeat_with_their_seed(place, merged):
    texts = []
    for seed in (0, 0, 1):
        answers = place / "drawn.txt"
        drawn = ["template=none", "prompt=the", "length=12", "temperature=3.0", f"seed={seed}", f"output={answers}"]
        run(generate, place / "drawn", f"source={merged}", *drawn)
        texts.append(answers.read_text())
    assert texts[0] == texts[1] != texts[2]


def test_an_export_does_not_write_over_a_folder(place, trained, merged, capfd):
    before = (merged / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run(export, place / "export", f"adapter={trained}/adapter", f"output={merged}", "device=cpu")
    assert "is there already and is left as it is" in capfd.readouterr().err
    assert (merged / "model.safetensors").read_bytes() == before


def test_a_resumed_run_is_the_run_that_was_never_stopped(place):
    model_and_data = ["experiment=qlora_hf", f"model.source={place}/model", f"data.source={place}/data.jsonl"]
    common = [*model_and_data, *TRAINING, "callbacks.sample=null", "callbacks.checkpoints.every_n_train_steps=3"]
    steps = ["trainer.max_steps=6", "data.batch_size=5", "model.lora.lora_dropout=0.1"]
    run(finetune, place / "whole", *common, *steps)
    middle = place / "whole" / "checkpoints" / "step_000003.ckpt"
    run(finetune, place / "resumed", *common, *steps, f"resume={middle}")
    first, second = (
        torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_base_in_8_bits_a_loss_from_whole_logits_and_two_learning_rates(place):
    model_and_data = ["experiment=llm_int8_lora", f"model.source={place}/model", f"data.source={place}/data.jsonl"]
    steps = ["trainer.max_steps=2", "callbacks.sample=null", "model.loss=whole_logits", "model.lora_plus_ratio=8"]
    run(finetune, place / "int8", *model_and_data, *TRAINING, *steps)
    checkpoint = torch.load(place / "int8" / "checkpoints" / "last.ckpt", weights_only=True)
    rates = {group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]}
    assert rates == {5e-3, 8 * 5e-3}
    assert json.loads((place / "int8" / "adapter" / "lq_base.json").read_text())["linear"] == "llm_int8"


def test_a_classifier_learns(place, capsys):
    data = place / "labels.csv"
    rows = [f"{word} is {word},{'colour' if word in ('sky', 'blue') else 'number'}" for word in WORDS * 20]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    chosen = ["experiment=classify_hf", f"model.source={place}/model", f"data.source={data}"]
    labels = ["data.labels=[number,colour]", "trainer.max_steps=20", *SHORT, *DATA, "lr=5e-3"]
    run(finetune, place / "classes", *chosen, *labels)
    assert "100.0% of them right" in capsys.readouterr().out
    adapter = load_file(place / "classes" / "adapter" / "adapter_model.safetensors")
    assert any("score" in name for name in adapter)


def test_a_rehearsal_writes_nothing(place):
    model_and_data = ["experiment=qlora_hf", f"model.source={place}/model", f"data.source={place}/data.jsonl"]
    run(finetune, place / "rehearsal", *model_and_data, *TRAINING, "trainer.fast_dev_run=true")
    assert {path.name for path in (place / "rehearsal").iterdir()} == {".hydra"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.source=/no/such/model"], "there is no folder /no/such/model"),
        (["data.source=/no/such/data.jsonl"], "no such data file or folder: /no/such/data.jsonl"),
        (["data.context=4096"], "data.context=4096 is beyond the 128 positions of the model"),
        (["model.loss=fast"], "loss is one of chunked, whole_logits, got 'fast'"),
        (["model.linear=nf5"], "nf5"),
        (["model.lora.target_modules=[absent_proj]"], "absent_proj"),
        (["data.source="], "no value for data.source"),
    ],
)
def test_what_cannot_be_trained_ends_before_it_begins(place, settings, message, capfd):
    given = {"model.source": f"{place}/model", "data.source": f"{place}/data.jsonl"}
    given |= dict(setting.split("=", 1) for setting in settings)
    given["data.source"] = given["data.source"] or "???"
    overrides = [f"{key}={value}" for key, value in given.items()]
    with pytest.raises(SystemExit):
        run(finetune, place / "refused", "experiment=qlora_hf", *TRAINING, "data.batch_size=1", *overrides)
    assert message in capfd.readouterr().err
    assert not list((place / "refused").rglob("*.ckpt"))


def test_a_chat_model_without_a_template_says_what_to_pass(place, save_llama, capfd):
    save_llama(place / "untaught", chat_template=None)
    model_and_data = ["experiment=qlora_hf", f"model.source={place}/untaught", f"data.source={place}/data.jsonl"]
    with pytest.raises(SystemExit):
        run(finetune, place / "refused", *model_and_data, *TRAINING)
    assert "has no chat template" in capfd.readouterr().err
    steps = ["trainer.max_steps=1", "callbacks.sample.prompt=one ?"]
    run(finetune, place / "plain", *model_and_data, *TRAINING, *steps, "model.template=plain")
    assert (place / "plain" / "sample.txt").read_text().startswith("one ?\n\n")
