"""How much faster linears were in 8 bits than in 16, by shape: measured on one device, kept as JSON.

    {"kind": "lq_plugin speed table", "version": 1,
     "device": "NVIDIA H200", "architecture": "sm_90", "tokens": 8192, "modes": ["eager", "compiled"],
     "measured": {"hardware": …, "torch": …, "triton": …, "command": …, "commit": …, "date": …},
     "rows": [{"in_features": 4096, "out_features": 4096, "format": "int8_switchback",
               "speedup": {"eager": …, "compiled": …}}, …],
     "digest": "…"}

speedup: milliseconds of forward and both gradients in 16 bits over those in the format. digest: sha256 of the rest, so
that a file that was cut or changed is found out.

`python -m recipes.benchmark benchmark=policy` writes one; those that ship with the package lie in tables/.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lq_plugin.formats import TRAINABLE_FORMATS, GemmFormats
from lq_plugin.formats.gemm import high_precision

KIND, VERSION = "lq_plugin speed table", 1
FOLDER = Path(__file__).parent / "tables"
MODES = ("eager", "compiled")
MAKE = "`python -m recipes.benchmark benchmark=policy` (lq-benchmark benchmark=policy) measures one"

Shape = tuple[int, int]  # in_features, out_features


def keeps_weight_gradient(formats: GemmFormats) -> bool:
    """Whether the weight gradient is a product of 16-bit operands, neither of which was in 8 bits before."""
    return formats.grad_weight == high_precision and not formats.keeps_codes


@dataclass(frozen=True)
class Row:
    """A format at a shape: how many times faster than 16 bits, by mode."""

    shape: Shape
    format: str
    speedup: Mapping[str, float]

    @property
    def least(self) -> float:
        """A model is not known to be compiled when its layers are chosen."""
        return min(self.speedup.values())


@dataclass(frozen=True)
class SpeedTable:
    """device: the name that its driver gives it. architecture: sm_90, gfx942 or cpu. measured: the circumstances."""

    device: str
    architecture: str
    tokens: int
    modes: tuple[str, ...]
    measured: Mapping[str, Any]
    rows: tuple[Row, ...]
    source: str = field(default="", compare=False)

    @classmethod
    def read(cls, path: str | Path) -> "SpeedTable":
        """FileNotFoundError: no such file. ValueError: not a table, changed since it was written, another version."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no speed table at {str(path)!r}; {MAKE}")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not a speed table ({error}); {MAKE}") from error
        return cls.of(content, str(path))

    @classmethod
    def of(cls, content: Any, source: str) -> "SpeedTable":
        """The table in a value read from JSON; ValueError as for `read`."""
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"{source} is not a speed table: expected an object of kind {KIND!r}; {MAKE}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{source} is a speed table of version {content.get('version')!r}, this lq_plugin reads version "
                f"{VERSION}; {MAKE}"
            )
        said, found = content.get("digest"), digest({key: x for key, x in content.items() if key != "digest"})
        if said != found:
            raise ValueError(
                f"{source} was changed since it was written: it says that its digest is {said!r}, and that is "
                f"{found!r}; {MAKE}"
            )
        try:
            return _parsed(content, source)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{source} lacks a part of a speed table, or has another in its place: {error!r}"
            ) from error

    def content(self) -> dict[str, Any]:
        """What `of` reads."""
        rows = [
            {"in_features": row.shape[0], "out_features": row.shape[1], "format": row.format, "speedup": row.speedup}
            for row in self.rows
        ]
        rest = {
            "kind": KIND,
            "version": VERSION,
            "device": self.device,
            "architecture": self.architecture,
            "tokens": self.tokens,
            "modes": list(self.modes),
            "measured": dict(self.measured),
            "rows": rows,
        }
        return rest | {"digest": digest(rest)}

    def write(self, path: str | Path) -> None:
        """One row a line; whenever it ends, the file is the old or the new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f" {json.dumps(key)}: {_rows(value) if key == 'rows' else json.dumps(value)}"
            for key, value in self.content().items()
        ]
        new = path.with_name(f"{path.name}.new")
        new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        new.replace(path)

    def nearest(self, in_features: int, out_features: int) -> tuple[Shape, list[Row]] | None:
        """The largest measured shape that is not larger in either side, and its rows; None below the smallest.

        8 bits gain with size: the nearest smaller shape tells at least how much. Of two shapes of one size the one
        that gains less is taken.
        """
        inside = {row.shape for row in self.rows if row.shape[0] <= in_features and row.shape[1] <= out_features}
        if not inside:
            return None
        shape = min(inside, key=lambda shape: (-shape[0] * shape[1], self._gain(shape), shape))
        return shape, self._at(shape)

    def _at(self, shape: Shape) -> list[Row]:
        return [row for row in self.rows if row.shape == shape]

    def _gain(self, shape: Shape) -> float:
        return max(row.least for row in self._at(shape))


def stored_tables() -> Iterator[SpeedTable]:
    """Those that ship with the package."""
    for path in sorted(FOLDER.glob("*.json")):
        yield SpeedTable.read(path)


def digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rows(rows: list[dict[str, Any]]) -> str:
    return "[\n  " + ",\n  ".join(map(json.dumps, rows)) + "\n ]"


def _parsed(content: Mapping[str, Any], source: str) -> SpeedTable:
    device, architecture, tokens = content["device"], content["architecture"], content["tokens"]
    modes, measured = tuple(content["modes"]), dict(content["measured"])
    if not (device and isinstance(device, str) and architecture and isinstance(architecture, str)):
        raise ValueError(f"{source} does not name its device: {device!r}, {architecture!r}")
    if not _is_size(tokens):
        raise ValueError(f"{source} has tokens={tokens!r}, expected a positive whole number")
    if not modes or not set(modes) <= set(MODES):
        raise ValueError(f"{source} has the modes {list(modes)}, expected one or both of {list(MODES)}")
    rows = tuple(_row(row, modes, source) for row in content["rows"])
    if not rows or len({(row.shape, row.format) for row in rows}) < len(rows):
        raise ValueError(f"{source} has no rows, or two of the same shape and format")
    return SpeedTable(device, architecture, tokens, modes, measured, rows, source)


def _row(row: Mapping[str, Any], modes: tuple[str, ...], source: str) -> Row:
    shape, name, speedup = (row["in_features"], row["out_features"]), row["format"], dict(row["speedup"])
    formats = TRAINABLE_FORMATS.get(name)
    if formats is None or not keeps_weight_gradient(formats):
        allowed = [known for known, formats in TRAINABLE_FORMATS.items() if keeps_weight_gradient(formats)]
        raise ValueError(
            f"{source} has the format {name!r}; 'auto' chooses among those whose weight gradient stays in 16 bits: "
            f"{', '.join(allowed)}"
        )
    good = all(isinstance(x, float | int) and math.isfinite(x) and x > 0 for x in speedup.values())
    if not all(map(_is_size, shape)) or not good or speedup.keys() != set(modes):
        raise ValueError(f"{source} has a row with sizes or speed-ups that cannot be: {dict(row)}")
    return Row(shape, name, speedup)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0
