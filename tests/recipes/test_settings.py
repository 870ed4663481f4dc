"""Keys that nobody reads are errors that name the known ones, and so are folders that cannot be used."""

import sys
from contextlib import suppress

import pytest

from lq_plugin.recipes.launch.output_folder import check_writable
from lq_plugin.recipes.launch.processes import hydra_options
from lq_plugin.recipes.train import main


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused(override) -> what main() prints to stderr before it exits; nothing may have been trained."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lq-train", "logger=csv", *overrides])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = leaving.value.code if isinstance(leaving.value.code, str) else ""
        return capfd.readouterr().err + said

    yield run
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("foo", "name, seed, lr, resume, quant"),
        ("quant.lineer", "Did you mean quant.linear? Known are: linear, optimizer, percentile_clipping"),
        ("optim.learning_rate", "lr, betas, eps"),
        ("model.head", "Did you mean model.heads?"),
        ("data.root", "Did you mean data.roots?"),
        ("trainer.max_step", "Did you mean trainer.max_steps?"),
        ("callbacks.memory.every", "every_n_steps"),
        ("logger.csv.folder", "save_dir, name, version"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(refused, plus, key, known):
    message = refused(f"{plus}{key}=1")
    assert f"unknown setting '{key}'" in message
    assert known in message


def test_an_entry_of_a_collection_must_be_an_object(refused):
    assert "unknown setting 'callbacks.foo': expected the _target_ of an object, got 1" in refused("+callbacks.foo=1")


def test_an_argument_that_is_known_but_not_in_the_file_gets_hydras_advice_only(refused):
    message = refused("trainer.overfit_batches=1")
    assert "+trainer.overfit_batches=1" in message
    assert "unknown setting" not in message


def test_a_missing_data_folder_stops_before_training(refused):
    message = refused("data.roots=[/no/such/folder]")
    assert "no such data folder: /no/such/folder" in message
    assert "stdlib" in message


def test_an_output_folder_below_a_file_stops_before_anything_is_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    message = refused(f"hydra.run.dir={folder}")
    assert message.strip() == (
        f"cannot write to the output folder {folder}: {tmp_path / 'file'} is a file. "
        "Choose another: hydra.run.dir=/path/to/folder"
    )


def test_the_folder_of_a_multirun_is_checked_too(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "hydra.sweep.dir=/path/to/folder" in refused("lr=1,2", f"hydra.sweep.dir={tmp_path}/file/run", "-m")


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    """A process of root may write everywhere but on read-only mounts, so that the answer is given here."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=f"{tmp_path} is not writable"):
        check_writable("hydra.run.dir", str(tmp_path / "new" / "run"))


def test_a_missing_checkpoint_stops_before_training(refused):
    assert "absent.ckpt" in refused("resume=/no/such/absent.ckpt", "data.context=8", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("option", "expected"),
    [("--help", "experiment: bytes_gpt, classify_hf, gpt_124m"), ("--cfg=job", "linear: int8_switchback")],
)
def test_help_and_configuration_are_printed_and_nothing_is_run(option, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lq-train", option])
    with suppress(SystemExit):  # by which --help ends
        main()
    assert expected in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_hydra_options_are_told_from_overrides():
    arguments = ["--config-dir", "mine", "lr=1", "-m", "~callbacks.figure", "+x=2", "--config-name=train"]
    assert hydra_options(arguments) == ["--config-dir", "mine", "--config-name=train"]
