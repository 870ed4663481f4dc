"""Records of every kind of file become texts or dialogues; what is neither is named with where it stands."""

import csv
import json
import sys

import pytest

from lq_plugin.recipes.tasks.samples import Dialogue, Text, read_samples, sample_of

QUESTION = ({"role": "user", "content": "why ?"}, {"role": "assistant", "content": "so."})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": list(QUESTION)},
        {"conversations": [{"from": "human", "value": "why ?"}, {"from": "gpt", "value": "so."}]},
        {"prompt": "why ?", "completion": "so."},
        {"prompt": [QUESTION[0]], "completion": [QUESTION[1]]},
        {"instruction": "why ?", "input": "", "output": "so."},
        {"instruction": "why ?", "response": "so.", "context": None},
        {"question": "why ?", "answer": "so.", "text": "ignored"},
        {"input": "why ?", "output": "so."},
    ],
    ids=str,
)
def test_the_usual_columns_make_a_dialogue(record):
    assert sample_of(record, "here") == Dialogue(QUESTION)


def test_a_third_column_and_a_system_prompt_are_part_of_the_dialogue():
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert sample_of(record, "here") == Dialogue(
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add.\n\n1 2"},
            {"role": "assistant", "content": "3"},
        )
    )


def test_columns_with_other_names_can_be_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"q": "why ?", "a": "so.", "text": "no"}))
    assert read_samples(str(path), columns={"prompt": "q", "answer": "a"}) == [Dialogue(QUESTION)]
    assert read_samples(str(path), columns={"text": "q"}) == [Text("why ?")]
    with pytest.raises(ValueError, match=r"data.columns names 'z'; the data has q, a, text"):
        read_samples(str(path), columns={"text": "z"})
    with pytest.raises(ValueError, match=r"columns names text, prompt, .*; it got target"):
        read_samples(str(path), columns={"target": "q"})


def test_every_kind_of_file_gives_the_same_samples(tmp_path):
    records = [{"prompt": f"what is {i} ?", "answer": f"it is {i}\nüber"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(records))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(records)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "d.parquet")
    each = [read_samples(str(tmp_path / name)) for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")]
    assert each[0][1].messages[1]["content"] == "it is 1\nüber"
    assert all(samples == each[0] for samples in each)
    assert read_samples(str(tmp_path)) == [sample for samples in each for sample in samples]


def test_a_folder_of_texts_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": "two", "a/z.md": "one", ".hidden.txt": "no", "empty.txt": " \n", "c.bin": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_samples(str(tmp_path)) == [Text("one"), Text("two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"\n', r"line 1 of .*data.jsonl is not JSON"),
        ('{"title": "a"}\n', r"record 1 of .* has the columns title; expected text; prompt"),
        ("[1, 2]\n", r"record 1 of .* is \[1, 2\]; expected columns and values"),
        ('{"text": "a"}\n{"text": 3}\n', r"record 2 of .*: column 'text' holds 3, expected a text"),
        ('{"messages": [{"role": "user"}]}\n', r"a message is \{role, content\} of two texts"),
        ("\n", r"data.jsonl holds no samples: it is empty"),
    ],
)
def test_what_is_no_sample_is_an_error_that_says_where(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_samples(str(path))


def test_an_empty_folder_and_a_file_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"holds no samples: it is empty, or has no files that end in .jsonl"):
        read_samples(str(tmp_path))
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"data.xlsx ends in .xlsx; data files end in .jsonl"):
        read_samples(str(tmp_path / "data.xlsx"))
    (tmp_path / "object.json").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"object.json holds a dict; expected a list of records"):
        read_samples(str(tmp_path / "object.json"))


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/no/such/folder"])
def test_a_path_that_is_missing_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="no such data file or folder: /"):
        read_samples(name)


def test_without_datasets_a_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"no file or folder is called 'org/name'; .* pip install datasets"):
        read_samples("org/name")


def test_a_data_set_by_name_is_read_from_the_split_and_configuration(monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(name, configuration, split):
            asked.append((name, configuration, split))
            if name == "org/absent":
                raise ConnectionError("no network")
            return [{"text": "one"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert read_samples("org/name:en", split="test") == [Text("one")]
    assert asked == [("org/name", "en", "test")]
    with pytest.raises(FileNotFoundError, match=r"'org/absent' is no file or folder, .*split 'train': no network"):
        read_samples("org/absent")
