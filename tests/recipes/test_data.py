"""Splits go by file and never change; batches depend on the seed and their number only."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from lq_plugin.recipes.tasks.python_sources import PythonSources
from lq_plugin.recipes.tasks.source_files import SourceFile, read_files, source_files
from lq_plugin.recipes.tasks.windows import TrainingBatches, ValidationBatches, Windows

SHARE = 0.05
TEXT = Windows(torch.arange(101, dtype=torch.uint8), context=10)


def batches(number: int, **options) -> list[dict[str, torch.Tensor]]:
    return list(islice(TrainingBatches(TEXT, batch_size=3, **{"seed": 0, **options}), number))


def test_the_standard_library_has_no_test_folder_and_nothing_installed():
    names = [file.name for file in source_files(["stdlib"])]
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert "argparse.py" in names
    assert "pydoc_data/topics.py" in names
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})


def test_about_one_file_in_twenty_is_for_validation():
    files = source_files(["stdlib"])
    share = sum(file.is_validation(SHARE) for file in files) / len(files)
    assert 0.03 < share < 0.07


def test_the_split_depends_on_the_name_below_the_root_only(tmp_path):
    """Literal names: a change of the hash would mix validation into training across versions."""
    known = {"argparse.py": False, "asyncio/tasks.py": False, "asyncio/events.py": True, "gzip.py": True}
    split = {name: SourceFile(tmp_path / name, name).is_validation(SHARE) for name in known}
    assert split == {name: SourceFile(Path("/elsewhere") / name, name).is_validation(SHARE) for name in known}
    assert split == known


def test_files_come_in_the_order_of_their_names_with_a_zero_byte_between(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.py", "a.py", "b/a.py"):
        (tmp_path / name).write_text(name)
    assert read_files(source_files([str(tmp_path)])) == b"a.py\0b/a.py\0c.py"


def test_a_label_is_the_byte_after_its_input():
    batch = TEXT.batch(torch.tensor([0, 9]))
    assert batch["input_ids"].tolist() == [list(range(10)), list(range(90, 100))]
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    first, again, other = batches(5), batches(5), batches(5, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))


def test_every_window_comes_once_before_any_comes_again():
    seen = torch.cat([batch["input_ids"][:, 0] for batch in batches(3)])
    assert len(seen.unique()) == len(seen) == 9  # of ten windows three full batches


def test_a_resumed_run_goes_on_where_it_stopped_also_in_a_later_pass():
    whole = batches(12)
    rest = batches(5, first=7)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(whole[7:], rest, strict=True))


def test_processes_share_the_batches_of_one_run():
    one = [batch["input_ids"] for batch in batches(6)]
    two = [[batch["input_ids"] for batch in batches(3, rank=rank, processes=2)] for rank in (0, 1)]
    interleaved = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert all(torch.equal(a, b) for a, b in zip(one, interleaved, strict=True))


def test_validation_windows_are_spread_over_the_text_and_shared_by_processes():
    whole = ValidationBatches(TEXT, number=4, batch_size=3)
    starts = torch.cat([batch["input_ids"][:, 0] for batch in whole]).tolist()
    assert len(whole) == 2
    assert starts == [0, 30, 60, 90]
    halves = [ValidationBatches(TEXT, 4, 3, rank, 2) for rank in (0, 1)]
    assert sorted(int(b["input_ids"][i, 0]) for half in halves for b in half for i in range(2)) == starts


def test_a_folder_that_is_missing_is_named_with_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such data folder: .*/absent.*'stdlib'"):
        PythonSources([str(tmp_path / "absent")], context=8, batch_size=2)


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"training files .* hold 5 bytes, at least 17 are needed"):
        PythonSources([str(tmp_path)], context=8, batch_size=2)
