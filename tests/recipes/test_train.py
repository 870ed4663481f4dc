"""The recipe from the command line to its artefacts, on a tiny model."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.integration


def last_checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> dict[int, float]:
    """step -> value, where there is one."""
    return {int(row["step"]): float(row[name]) for row in metrics(folder) if row[name]}


@pytest.mark.parametrize("experiment", ["bytes_gpt", "gpt_124m"])
@pytest.mark.parametrize("quant", ["int8_switchback", "none"])
def test_fast_dev_run_writes_nothing(train, experiment, quant):
    small = ["model.width=48", "model.depth=1", "data.batch_size=2", "data.roots=[stdlib]"]
    chosen = [f"experiment={experiment}", f"quant={quant}"]
    run = train(*chosen, *small, "trainer.fast_dev_run=true", "trainer.accelerator=cpu", tiny=False)
    assert run.printed.splitlines()[-1].endswith("nothing was written")
    assert {path.name for path in run.folder.iterdir()} == {".hydra"}


def test_a_run_leaves_its_artefacts_and_names_them_in_its_last_lines(train, tmp_path):
    run = train()
    made = ["checkpoints/last.ckpt", "metrics/metrics.csv", "training.png", "sample.txt", ".hydra/config.yaml"]
    for name in made:
        assert (run.folder / name).exists(), name
        assert str((run.folder / name).relative_to(tmp_path)) in run.printed
    summary = run.printed[run.printed.index("finished after 6 steps, ") :].splitlines()
    assert summary[-1].startswith("resume: ")
    assert summary[-1].endswith("resume=outputs/run_0/checkpoints/last.ckpt trainer.max_steps=12")
    assert (run.folder / "sample.txt").read_text(errors="replace").startswith("def ")
    with Image.open(run.folder / "training.png") as image:
        assert image.width > 800
        assert len(image.getcolors(maxcolors=1 << 24)) > 10, "something is drawn"


def test_everything_is_logged_once_at_its_step(train):
    run = train()
    assert list(column(run.folder, "train/bits_per_byte")) == [1, 3, 5]
    assert list(column(run.folder, "val/bits_per_byte")) == [2, 5]
    assert list(column(run.folder, "memory/weights_mb")) == [1, 3, 5]
    assert list(column(run.folder, "throughput/tokens_per_second")) == [1, 3, 5]
    cells = [(name, row["step"]) for row in metrics(run.folder) for name in row if row[name] and "/" in name]
    assert len(cells) == len(set(cells))


def test_the_last_step_is_validated_and_saved_wherever_it_falls(train):
    run = train("trainer.max_steps=5")
    assert list(column(run.folder, "val/bits_per_byte")) == [2, 4]
    assert last_checkpoint(run.folder)["global_step"] == 5


def test_the_same_seed_gives_the_same_run_and_another_one_another(train):
    losses = [column(train(*seed).folder, "train/bits_per_byte") for seed in ([], [], ["seed=1"])]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_resumed_run_is_the_run_that_was_never_stopped(train):
    whole = train("trainer.max_steps=6")
    resumed = train(f"resume={whole.folder}/checkpoints/step_000002.ckpt")
    assert list(column(resumed.folder, "train/bits_per_byte")) == [3, 5]
    assert last_checkpoint(resumed.folder)["global_step"] == 6
    for name, weight in last_checkpoint(whole.folder)["state_dict"].items():
        assert torch.equal(weight, last_checkpoint(resumed.folder)["state_dict"][name]), name


def test_a_finished_run_goes_on_from_its_last_checkpoint(train):
    first = train()
    longer = train(f"resume={first.folder}/checkpoints/last.ckpt", "trainer.max_steps=8")
    steps = column(longer.folder, "train/bits_per_byte")
    assert list(steps) == [7]
    assert all(math.isfinite(loss) for loss in steps.values())


def test_checkpoints_keep_plain_hyperparameters(train):
    saved = last_checkpoint(train().folder)["hyper_parameters"]
    assert saved == {"width": 16, "depth": 1, "heads": 2, "context": 16, "warmup_steps": 100}
    assert all(type(value) is int for value in saved.values())


def test_wandb_writes_offline_and_ends_with_the_run(train, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = train("logger=wandb")
    folders = list((run.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    assert list(folders[0].glob("*.wandb"))
    assert f"wandb sync outputs/run_0/wandb/{folders[0].name}" in run.printed
    assert wandb.run is None
    assert (run.folder / "metrics" / "metrics.csv").exists()


def test_a_multirun_has_a_folder_and_a_wandb_run_for_each_job(train, tmp_path):
    train("lr=1e-3,2e-3", "logger=wandb", f"hydra.sweep.dir={tmp_path}/sweep", "-m")
    for job, rate in (("0", "0.001"), ("1", "0.002")):
        assert f"lr: {rate}" in (tmp_path / "sweep" / job / ".hydra" / "config.yaml").read_text()
        assert len(list((tmp_path / "sweep" / job / "wandb").glob("offline-run-*"))) == 1


def test_the_rate_of_the_optimizer_itself_can_be_swept(train, tmp_path):
    train("optim.lr=1e-3,2e-3", f"hydra.sweep.dir={tmp_path}/sweep", "-m")
    optimizers = [last_checkpoint(tmp_path / "sweep" / job)["optimizer_states"][0] for job in "01"]
    assert [optimizer["param_groups"][0]["initial_lr"] for optimizer in optimizers] == [1e-3, 2e-3]


def test_without_wandb_the_csv_logger_runs_and_the_other_says_what_to_do(tmp_path, sources):
    blocked = "import sys; sys.modules['wandb'] = None; from lq_plugin.recipes.train import main; main()"
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", "data.validation_windows=4"]
    short = ["trainer.max_steps=2", "trainer.accelerator=cpu", f"data.roots=[{sources}]", "callbacks.sample.length=2"]

    def run(logger: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", blocked, f"logger={logger}", f"hydra.run.dir={logger}", *tiny, *short]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("csv").returncode == 0
    assert (tmp_path / "csv" / "metrics" / "metrics.csv").exists()
    assert "pip install wandb, or pass logger=csv" in run("wandb").stderr


@pytest.mark.slow
def test_a_multirun_on_two_processes_runs_each_job_once_and_in_one_folder(tmp_path, sources):
    """Lightning starts the second process of each job with a command line: it must be the job's, not the sweep's."""
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "model.context=16", f"data.roots=[{sources}]"]
    short = ["trainer.max_steps=2", "data.validation_windows=4", "callbacks.sample.length=2", "logger=csv"]
    processes = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    sweep = ["seed=0,1", "hydra.sweep.dir=sweep", "-m"]
    command = [sys.executable, "-m", "lq_plugin.recipes.train", *tiny, *short, *processes, *sweep]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 2 steps") == 2
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {".lock", "0", "1", "multirun.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "sources"}
    assert all(last_checkpoint(tmp_path / "sweep" / job)["global_step"] == 2 for job in "01")
