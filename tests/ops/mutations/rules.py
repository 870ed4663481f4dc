"""How a line of a kernel is broken: one rule for each kind of mistake, from a syntax node to edits of the source."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeGuard

_LONGEST_SHOWN = 160  # bytes


@dataclass(frozen=True)
class Edit:
    kind: str
    start: int
    end: int
    text: str


@dataclass(frozen=True, eq=False)
class Source:
    """The bytes of a module, its syntax tree, and where a node stands."""

    code: bytes
    tree: ast.Module = field(init=False)
    _lines: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.code))
        starts = [0]
        for line in self.code.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        object.__setattr__(self, "_lines", starts)

    def span(self, node: Any) -> tuple[int, int]:
        start = self._lines[node.lineno - 1] + node.col_offset
        end = self._lines[node.end_lineno - 1] + node.end_col_offset
        return start, end

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.code[start:end].decode()

    def line(self, edit: Edit) -> int:
        return self.code.count(b"\n", 0, edit.start) + 1

    def replace(self, kind: str, node: ast.AST, text: str) -> Edit:
        return Edit(kind, *self.span(node), text)

    def operator(self, kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        """Writes `new` for the operator `old`, which stands between two operands and perhaps their brackets."""
        start, end = self.span(left)[1], self.span(right)[0]
        return Edit(kind, start, end, self.code[start:end].decode().replace(old, new, 1))

    def shown(self, node: ast.AST, edit: Edit) -> tuple[str, str]:
        """The smallest piece that an edit changes, before and after, on one line each."""
        start, end = min(self.span(node)[0], edit.start), max(self.span(node)[1], edit.end)
        if isinstance(node, ast.FunctionDef | ast.If | ast.For) or end - start > _LONGEST_SHOWN:
            start, end = edit.start, edit.end
        before = self.code[start:end].decode()
        after = self.code[start : edit.start].decode() + edit.text + self.code[edit.end : end].decode()
        return " ".join(before.split()), " ".join(after.split())


Rule = Callable[[ast.AST, Source], Iterator[Edit]]


def _calls(node: ast.AST, *names: str) -> TypeGuard[ast.Call]:
    """Whether the node calls a function or method of one of these names."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in names


def _all_true(text: str) -> str:
    return f"(({text}) == ({text}))"


def mask_dropped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "load", "store"):
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield source.replace("mask dropped", keyword.value, _all_true(source.text(keyword.value)))


def half_of_a_mask_dropped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        halves = (node.left, node.right)
        if any(isinstance(half, ast.Compare) for half in halves):
            for half in halves:
                yield source.replace("half of a mask dropped", half, _all_true(source.text(half)))


def other_changed(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "load"):
        for keyword in node.keywords:
            if keyword.arg == "other":
                zero = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                yield source.replace("other changed", keyword.value, "1" if zero else "0")


_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}


def comparison(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        old, new = _COMPARISONS[type(node.ops[0])]
        right = node.comparators[0]
        yield source.operator(f"{old} to {new}", node.left, right, old, new)
        yield source.replace("threshold off by one", right, f"({source.text(right)} - 1)")


def offset_off_by_one(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "arange", "program_id"):
        yield source.replace("offset off by one", node, f"({source.text(node)} + 1)")


def steps_skipped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.For) and _calls(node.iter, "range") and len(node.iter.args) == 3:
        first, end, step = node.iter.args
        yield source.replace("first step skipped", first, f"{source.text(first)} + {source.text(step)}")
        yield source.replace("last step skipped", end, f"{source.text(end)} - {source.text(step)}")


def strides_swapped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.FunctionDef):
        arguments = node.args.args
        for a, b in pairwise(arguments):
            if a.arg.startswith("stride_") and b.arg.startswith("stride_") and not (a.annotation or b.annotation):
                between = source.code[source.span(a)[1] : source.span(b)[0]].decode()
                yield Edit("strides swapped", source.span(a)[0], source.span(b)[1], f"{b.arg}{between}{a.arg}")


_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}


def arithmetic(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        old, new = _OPERATORS[type(node.op)]
        left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        yield source.operator(f"{old} to {new}", left, right, old, new)


_SCALES = re.compile(r"scale|factor|inverse|amax|absmax")


def scale_dropped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for operand, other in ((node.left, node.right), (node.right, node.left)):
            if _SCALES.search(source.text(operand)):
                yield source.replace("scale dropped", node, f"({source.text(other)})")
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult) and _SCALES.search(source.text(node.value)):
        yield source.replace("scale dropped", node, "pass")


_OPPOSITES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "sum": "max"}


def extremum(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, *_OPPOSITES) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        opposite = _OPPOSITES[name]
        yield source.replace(f"{name} to {opposite}", node.func, source.text(node.func).removesuffix(name) + opposite)
    if _calls(node, "abs"):
        yield source.replace("abs dropped", node, f"({source.text(node.args[0])})")


def rounding(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "int8_nearest"):
        yield source.replace("truncated, not rounded", node, f"({source.text(node.args[0])}).to(tl.int8)")
    if _calls(node, "div_rn"):
        a, b = (source.text(argument) for argument in node.args)
        yield source.replace("division by reciprocal", node, f"(({a}) * (1.0 / ({b})))")
    if isinstance(node, ast.Name) and node.id == "ROUNDING_OFFSET":
        yield source.replace("rounding moved", node, f"({node.id} + 1.0)")


def branches_swapped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "where") and len(node.args) == 3:
        a, b = node.args[1:]
        between = source.code[source.span(a)[1] : source.span(b)[0]].decode()
        text = f"{source.text(b)}{between}{source.text(a)}"
        yield Edit("branches of where swapped", source.span(a)[0], source.span(b)[1], text)


def constant_changed(node: ast.AST, source: Source) -> Iterator[Edit]:
    """Operands only: a changed shape, axis or range would not run at all."""
    operands: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        operands = [node.left, node.right]
    elif isinstance(node, ast.Compare):
        operands = node.comparators
    elif _calls(node, "where", "maximum", "minimum", "full"):
        operands = node.args[1:]
    for operand in operands:
        value = operand.value if isinstance(operand, ast.Constant) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed = value + 1 if isinstance(value, int) or not value else value * 1.5
            yield source.replace("constant changed", operand, repr(changed))


_HINTS = ("multiple_of", "max_contiguous")  # for the compiler; no result depends on them


def statement_dropped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.Expr) and _calls(node.value, "store", "atomic_add", "atomic_max"):
        yield source.replace("store dropped", node, "pass")
    elif isinstance(node, ast.AugAssign):
        yield source.replace("statement dropped", node, "pass")
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not _calls(node.value, *_HINTS):
        names = {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
        if node.targets[0].id in names:
            yield source.replace("statement dropped", node, "pass")


def cast_dropped(node: ast.AST, source: Source) -> Iterator[Edit]:
    if _calls(node, "to") and isinstance(node.func, ast.Attribute):
        value, target = source.text(node.func.value), source.text(node.args[0])
        if node.keywords:
            yield source.replace("bitcast to cast", node, f"({value}).to({target})")
        elif target == "tl.int64":
            yield source.replace("int64 cast dropped", node, f"({value})")


def condition_negated(node: ast.AST, source: Source) -> Iterator[Edit]:
    if isinstance(node, ast.If | ast.IfExp):
        yield source.replace("condition negated", node.test, f"not ({source.text(node.test)})")


RULES: tuple[Rule, ...] = (
    mask_dropped,
    half_of_a_mask_dropped,
    other_changed,
    comparison,
    offset_off_by_one,
    steps_skipped,
    strides_swapped,
    arithmetic,
    scale_dropped,
    extremum,
    rounding,
    branches_swapped,
    constant_changed,
    statement_dropped,
    cast_dropped,
    condition_negated,
)

# Kinds that are chosen first: mistakes of the field that leave most results right.
URGENT = {
    *("mask dropped", "half of a mask dropped", "other changed", "threshold off by one", "< to <=", "strides swapped"),
    *("scale dropped", "truncated, not rounded", "division by reciprocal", "rounding moved", "store dropped"),
    *("branches of where swapped", "last step skipped", "max to min"),
}
