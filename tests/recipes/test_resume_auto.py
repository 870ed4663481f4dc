"""resume=auto goes on from the newest whole checkpoint of the same run, names the others, or begins."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.integration

OWN_FOLDERS = "hydra.run.dir=outputs/${name}/${now:%Y-%m-%d_%H-%M-%S-%f}"  # as in train.yaml, in microseconds


def step_of(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def said(printed: str) -> list[str]:
    return [line.removeprefix("resume=auto: ") for line in printed.splitlines() if line.startswith("resume=auto: ")]


def newest_last(folder: Path, *names: str) -> list[Path]:
    """Gives the checkpoints modification times in this order."""
    paths = [folder / "checkpoints" / name for name in names]
    for second, path in enumerate(paths):
        os.utime(path, (second + 1, second + 1))
    return paths


def flip_a_bit_of_the_weights(path: Path) -> None:
    """Which torch.load does not notice."""
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["gpt.lm_head.weight"]
    data[data.find(weight.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)


def test_without_a_checkpoint_a_run_begins_and_says_so(train):
    run = train("resume=auto")
    assert said(run.printed) == ["no whole checkpoint, starting from the beginning"]
    assert step_of(run.folder) == 6


def test_damaged_checkpoints_are_named_and_passed_over(train):
    first = train()
    oldest, cut, flipped, weights_only, no_checkpoint = newest_last(
        first.folder, "step_000002.ckpt", "step_000004.ckpt", "step_000006.ckpt", "last.ckpt", "last.ckpt"
    )
    flip_a_bit_of_the_weights(flipped)
    cut.write_bytes(cut.read_bytes()[:-1000])
    torch.save({"state_dict": {}}, weights_only)
    no_checkpoint = no_checkpoint.with_name("empty.ckpt")
    no_checkpoint.touch()
    newest_last(first.folder, oldest.name, cut.name, flipped.name, weights_only.name, no_checkpoint.name)
    resumed = train("resume=auto", f"hydra.run.dir={first.folder}")
    lines = said(resumed.printed)
    for line, path in zip(lines, (no_checkpoint, weights_only, flipped, cut), strict=False):
        assert line.startswith(f"passing over {path}: ")
    assert lines[4:] == [f"going on from {oldest} (step 2)"]
    assert step_of(first.folder) == 6
    names = {path.name for path in oldest.parent.iterdir()}
    assert names == {"step_000002.ckpt", "step_000004.ckpt", "step_000006.ckpt", "last.ckpt", "empty.ckpt"}


def test_with_damaged_ones_only_a_run_begins(train):
    first = train("trainer.max_steps=2")
    for path in (first.folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    resumed = train("resume=auto", f"hydra.run.dir={first.folder}")
    assert said(resumed.printed)[-1] == "no whole checkpoint among these, starting from the beginning"
    assert step_of(first.folder) == 6


def test_runs_with_a_folder_each_go_on_from_the_newest_of_the_same_settings(train, tmp_path):
    for settings in ("trainer.max_steps=4", "lr=0.5", "quant=none"):
        train(OWN_FOLDERS, settings)
    longer = train(OWN_FOLDERS, "resume=auto", "trainer.max_steps=8")
    folders = sorted((tmp_path / "outputs" / "bytes_gpt").iterdir())
    assert said(longer.printed) == [f"going on from {folders[0]}/checkpoints/last.ckpt (step 4)"]
    assert [step_of(folder) for folder in folders] == [4, 6, 6, 8]


def test_a_run_with_a_fixed_folder_looks_there_only(train):
    train("trainer.max_steps=4")
    assert said(train("resume=auto").printed) == ["no whole checkpoint, starting from the beginning"]


def test_a_finished_run_ends_at_once(train):
    first = train()
    before = (first.folder / "metrics" / "metrics.csv").read_bytes()
    again = train("resume=auto", f"hydra.run.dir={first.folder}")
    assert "finished after 6 steps" in again.printed
    assert (first.folder / "metrics" / "metrics.csv").read_bytes() == before


def test_a_run_does_not_begin_among_the_checkpoints_of_another(train, capsys):
    first = train()
    with pytest.raises(SystemExit):
        train(f"hydra.run.dir={first.folder}")
    assert re.search(r"run_0 holds 4 checkpoints of an earlier run.* resume=auto", capsys.readouterr().err)
    shutil.rmtree(first.folder / "checkpoints")
    train(f"hydra.run.dir={first.folder}")
    assert step_of(first.folder) == 6
