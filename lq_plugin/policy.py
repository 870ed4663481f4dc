"""Which format a layer gets: its name against the user's patterns.

A pattern without `*` is a suffix of whole dotted names (`q_proj`, `layers.1.mlp`), one with `*` is a glob over the
whole name, and `all-linear` matches every layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from lq_plugin.formats import FORMATS, format_named
from lq_plugin.formats.gemm import GemmFormats

LinearSpec = str | GemmFormats | Mapping[str, "str | GemmFormats | None"] | None

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

    rules: tuple[tuple[str, GemmFormats | None], ...]
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

    def decide(self, name: str) -> tuple[GemmFormats | None, str]:
        """The format of a layer, or None and the reason."""
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


def _format(spec: "str | GemmFormats | None") -> GemmFormats | None:
    if spec is None or spec == "none" or isinstance(spec, GemmFormats):
        return spec if isinstance(spec, GemmFormats) else None
    if spec == "auto":
        raise ValueError(
            f"linear='auto' needs measured tables that this version does not have; formats: {', '.join(FORMATS)}"
        )
    if not isinstance(spec, str):
        raise TypeError(f"linear takes a format name, a format, a {{pattern: format}} dict or None, got {spec!r}")
    return format_named(spec)
