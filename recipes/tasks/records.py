"""Records out of files, folders and Hugging Face data sets, each with the place where it stands."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # a file is one record, {"text": ...}
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_records(source: str, split: str = "train") -> Iterator[tuple[str, Record]]:
    """Where each record of a file, of the files below a folder, or of a data set on the hub stands, and the record.

    source: a .jsonl, .json, .csv, .parquet or text file; a folder of such, in the order of their names, hidden ones
    left out; or a hub name, "org/name" or "org/name:configuration", of which `split` is read.

    FileNotFoundError: no such file, folder or data set. ValueError: a file that cannot be read, or no record at all.
    """
    path = Path(source).expanduser()
    found: Iterable[tuple[str, Record]]
    if path.is_dir():
        found = (record for file in _files_below(path) for record in _of_file(file))
    elif path.exists():
        found = _of_file(path)
    elif path.suffix in (*TEXT_SUFFIXES, *RECORD_SUFFIXES) or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"no such data file or folder: {path.absolute()}")
    else:
        found = _numbered(_hub_data_set(source, split), source)
    empty = True
    for record in found:
        empty = False
        yield record
    if empty:
        raise ValueError(f"{source} holds no samples: it is empty, or has no files that end in {_suffixes()}")


def _files_below(folder: Path) -> list[Path]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [name for name in names if not any(part.startswith((".", "__")) for part in name.parts)]
    return [folder / name for name in shown if name.suffix.lower() in (*TEXT_SUFFIXES, *RECORD_SUFFIXES)]


def _of_file(path: Path) -> Iterator[tuple[str, Record]]:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        text = path.read_text(encoding="utf-8")
        return iter([(str(path), {"text": text})] if text.strip() else [])
    readers: dict[str, Callable[[Path], Iterable[Any]]] = {
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if suffix not in readers:
        raise ValueError(f"{path} ends in {suffix or 'nothing'}; data files end in {_suffixes()}")
    return _numbered(readers[suffix](path), str(path))


def _numbered(records: Iterable[Any], name: str) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(records, start=1):
        where = f"record {number} of {name}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} is {record!r}; expected columns and values")
        yield where, record


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parsed(line, f"line {number} of {path}")


def _json_list(path: Path) -> list[Any]:
    records = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(records, list):
        raise ValueError(
            f"{path} holds a {type(records).__name__}; expected a list of records, or one per line (.jsonl)"
        )
    return records


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _csv_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _parquet_rows(path: Path) -> list[Any]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("parquet files need pyarrow: pip install pyarrow") from error
    return parquet.read_table(path).to_pylist()


def _hub_data_set(name: str, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"no file or folder is called {name!r}; data sets by name need: pip install datasets"
        ) from error
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder, and no data set of that name could be loaded, split {split!r}: {error}"
        ) from error


def _suffixes() -> str:
    return ", ".join((*RECORD_SUFFIXES, *TEXT_SUFFIXES))
