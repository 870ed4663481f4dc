"""Texts and dialogues out of records, told by their columns.

A text is learned as it is; a dialogue is a list of messages, of which the answers are learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lq_plugin.recipes.tasks.records import Record, read_records

Message = dict[str, str]  # role, content

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "output", "answer")
CONTEXTS = ("input", "context")  # Alpaca's and Dolly's third column: what the instruction is about
SYSTEMS = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names
COLUMNS = ("text", "prompt", "answer", "system", "messages")
KNOWN = (
    "text; prompt, instruction or question with completion, response, output or answer; messages or conversations, "
    "lists of {role, content}"
)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Messages in turn; `assistant` is the role of the answers."""

    messages: tuple[Message, ...]


Sample = Text | Dialogue


def read_samples(source: str, *, split: str = "train", columns: Record | None = None) -> list[Sample]:
    """All samples of a source, as `read_records` takes it.

    columns: {"prompt": "q", "answer": "a"}, {"text": "body"}, ... for columns with other names than the usual ones
    (`sample_of`). ValueError: a record that is no sample.
    """
    unknown = set(columns or ()) - set(COLUMNS)
    if unknown:
        raise ValueError(f"columns names {', '.join(COLUMNS)}; it got {', '.join(sorted(unknown))}")
    return [sample_of(record, where, columns) for where, record in read_records(source, split)]


def sample_of(record: Record, where: str, columns: Record | None = None) -> Sample:
    """A record by its columns: messages, else prompt and answer, else text; ValueError if it has none of them."""
    columns = columns or {}
    found = _named(record, columns.get("messages"), MESSAGES)
    if found:
        return Dialogue(tuple(_message(entry, where) for entry in record[found]))
    prompt = _named(record, columns.get("prompt"), PROMPTS)
    answer = _named(record, columns.get("answer"), ANSWERS)
    if prompt and answer:
        return Dialogue(tuple(_pair(record, prompt, answer, columns, where)))
    text = _named(record, columns.get("text"), ("text",))
    if text:
        return Text(_string(record, text, where))
    raise ValueError(
        f"{where} has the columns {', '.join(map(str, record)) or 'none'}; expected {KNOWN}; see data.columns"
    )


def _pair(record: Record, prompt: str, answer: str, columns: Record, where: str) -> Iterator[Message]:
    """Messages of a prompt and an answer; either may be a list of messages itself."""
    system = _named(record, columns.get("system"), SYSTEMS)
    if system and record[system]:
        yield {"role": "system", "content": _string(record, system, where)}
    if isinstance(record[prompt], list):
        yield from (_message(entry, where) for entry in record[prompt])
    else:
        about = [record[name] for name in CONTEXTS if name != prompt and record.get(name)]
        yield {"role": "user", "content": "\n\n".join([_string(record, prompt, where), *map(str, about)])}
    if isinstance(record[answer], list):
        yield from (_message(entry, where) for entry in record[answer])
    else:
        yield {"role": "assistant", "content": _string(record, answer, where)}


def _message(entry: Any, where: str) -> Message:
    if isinstance(entry, Mapping):
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}
    raise ValueError(f"{where}: a message is {{role, content}} of two texts, got {entry!r}")


def _string(record: Record, column: str, where: str) -> str:
    if not isinstance(record[column], str):
        raise ValueError(f"{where}: column {column!r} holds {record[column]!r}, expected a text")
    return record[column]


def _named(record: Record, chosen: str | None, usual: Sequence[str]) -> str | None:
    """The column that the user chose, or the first usual one that the record has."""
    if chosen is not None and chosen not in record:
        raise ValueError(f"data.columns names {chosen!r}; the data has {', '.join(map(str, record))}")
    return chosen or next((name for name in usual if record.get(name) is not None), None)
