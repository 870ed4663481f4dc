"""What an audit found out, as values; the table is another's work."""

from dataclasses import dataclass, field

BROKEN, UNKNOWN, NOTE = "broken", "not understood", "note"
# Kinds whose tensors nothing else describes
TENSOR_FILE, TENSOR_FOLDER, STATE_DICT = "tensor file", "folder of tensor files", "state_dict of a module"
_EXIT_CODES = {BROKEN: 1, UNKNOWN: 2, NOTE: 0}


@dataclass(frozen=True)
class Finding:
    """level: BROKEN, UNKNOWN or NOTE."""

    level: str
    text: str


@dataclass
class Row:
    """Tensors that are kept in the same way. block: what shares a scale. codes: the element type or map.

    worst: the lowest SQNR in dB against the reference, and the name of that tensor.
    """

    where: str
    format: str
    block: str
    codes: str
    tensors: int = 0
    values: int = 0
    bytes: int = 0
    signal: float = 0.0
    noise: float = 0.0
    worst: tuple[float, str] | None = None
    is_quantized: bool = False


@dataclass
class Audit:
    """facts, readers: what it says -> text, in the order in which they are shown. readers: who would load it."""

    path: str
    kind: str = "not understood"
    facts: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: str, text: str) -> None:
        self.findings.append(Finding(level, text))

    @property
    def is_whole(self) -> bool:
        return not any(finding.level == BROKEN for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0: whole. 1: broken. 2: not understood, and nothing of what is was broken."""
        codes = {_EXIT_CODES[finding.level] for finding in self.findings}
        return 1 if 1 in codes else 2 if 2 in codes else 0

    def of(self, level: str) -> list[str]:
        return [finding.text for finding in self.findings if finding.level == level]

    def row(self, where: str, format: str, block: str, codes: str, is_quantized: bool) -> Row:
        """The row of these, which is new when it is asked for first."""
        for row in self.rows:
            if (row.where, row.format, row.block, row.codes) == (where, format, block, codes):
                return row
        self.rows.append(Row(where, format, block, codes, is_quantized=is_quantized))
        return self.rows[-1]


FEW = 6  # names in a message


def few(names: list[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
