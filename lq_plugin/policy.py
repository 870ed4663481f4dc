"""Which format a layer gets: its name against the user's patterns.

A pattern without `*` is a suffix of whole dotted names (`q_proj`, `layers.1.mlp`), one with `*` is a glob over the
whole name, and `all-linear` matches every layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lq_plugin.auto_format import Auto, Chooser, Device
from lq_plugin.formats import Format, format_named
from lq_plugin.formats.frozen import FrozenFormat
from lq_plugin.formats.gemm import GemmFormats

LinearSpec = str | Format | Auto | Mapping[str, "str | Format | Auto | None"] | None
Wanted = Format | Auto | Chooser | None  # Auto until the device is known

ALL_LINEAR = "all-linear"
NO_PATTERN = "matches no pattern"


def matches(pattern: str, name: str) -> bool:
    if pattern == ALL_LINEAR:
        return True
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


@dataclass(frozen=True)
class Policy:
    """rules: patterns in the order in which they are tried, None leaves a layer alone. skip: patterns left alone first.

    user_patterns: those of them that the user wrote, each of which has to match a layer.
    """

    rules: tuple[tuple[str, Wanted], ...]
    skip: tuple[str, ...]
    user_patterns: tuple[str, ...]

    @classmethod
    def of(cls, linear: LinearSpec, skip: Iterable[str]) -> "Policy":
        skip = _patterns(skip)
        if isinstance(linear, Mapping):
            rules = tuple((pattern, _format(spec)) for pattern, spec in linear.items())
            return cls(rules, skip, (*linear, *skip))
        return cls(((ALL_LINEAR, _format(linear)),), skip, skip)

    @property
    def converts(self) -> bool:
        return any(formats is not None for _, formats in self.rules)

    @property
    def freezes(self) -> bool:
        return any(isinstance(format, FrozenFormat) for _, format in self.rules)

    @property
    def is_auto(self) -> bool:
        """Whether a rule chooses by the shape of a layer."""
        return any(isinstance(wanted, Auto | Chooser) for _, wanted in self.rules)

    def on(self, device: Device) -> "Policy":
        """The policy of a model that trains on `device`; errors are those of Auto.on."""
        rules = ((pattern, x.on(device) if isinstance(x, Auto) else x) for pattern, x in self.rules)
        return replace(self, rules=tuple(rules))

    @property
    def notes(self) -> tuple[str, ...]:
        """What chose where a rule is "auto"."""
        return tuple(dict.fromkeys(wanted.note for _, wanted in self.rules if isinstance(wanted, Chooser)))

    def decide(self, name: str) -> tuple[Wanted, str]:
        """The format of a layer, or who chooses it, or None and the reason."""
        for pattern in self.skip:
            if matches(pattern, name):
                return None, f"skip={pattern!r}"
        for pattern, formats in self.rules:
            if matches(pattern, name):
                return formats, "" if formats else "linear=None" if pattern == ALL_LINEAR else f"{pattern!r} is none"
        return None, NO_PATTERN

    def names_in_full(self, name: str) -> bool:
        """Whether a rule is this very name, which overrides what is otherwise always left alone."""
        return any(pattern == name and formats is not None for pattern, formats in self.rules)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises ValueError for a pattern of the user's that matches none of the layers."""
        names = list(names)
        for pattern in self.user_patterns:
            if not any(matches(pattern, name) for name in names):
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
                raise ValueError(
                    f"pattern {pattern!r} matches no linear layer; their names end in: {endings}. "
                    "Without '*' a pattern is a suffix of whole dotted names, with it a glob over the whole name"
                )


def _patterns(skip: Iterable[str]) -> tuple[str, ...]:
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"skip takes name patterns, got {pattern!r}")
    return patterns


def _format(spec: "str | Format | Auto | None") -> Format | Auto | None:
    if isinstance(spec, GemmFormats | FrozenFormat | Auto):
        return spec
    if spec is None or spec == "none":
        return None
    if spec == "auto":
        return Auto()
    if not isinstance(spec, str):
        raise TypeError(
            f"linear takes a format name, a format, 'auto', a {{pattern: format}} dict or None, got {spec!r}"
        )
    return format_named(spec)
