"""The @triton.jit functions of a package, the places in them that can be broken, and which of those are chosen.

A kernel is a function whose name ends in `_kernel`, everything else under @triton.jit a device function. A choice
covers kinds of mutation before it repeats one, those that break results silently first, and is the same every time.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from mutations.rules import RULES, URGENT, Source

PER_KERNEL = 8
PER_DEVICE_FUNCTION = 4


@dataclass(frozen=True)
class Mutation:
    """Bytes [start, end) of a file of the package, and what is written in their place."""

    function: str
    kind: str
    file: str
    line: int
    start: int
    end: int
    replacement: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.file}:{self.line}) {self.before} -> {self.after}"

    def apply(self, package: Path) -> None:
        path = package / self.file
        code = path.read_bytes()
        path.write_bytes(code[: self.start] + self.replacement.encode() + code[self.end :])


@dataclass(frozen=True)
class Function:
    """A @triton.jit function; `file` is relative to the package."""

    name: str
    file: str
    source: Source
    node: ast.FunctionDef

    @property
    def is_kernel(self) -> bool:
        return self.name.endswith("_kernel")

    def called_names(self) -> set[str]:
        return {
            node.func.id
            for node in ast.walk(self.node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }

    def mutations(self) -> list[Mutation]:
        """All, in the order of the source."""
        found = {}
        for node in _inside(self.node):
            for rule in RULES:
                for edit in rule(node, self.source):
                    before, after = self.source.shown(node, edit)
                    line = self.source.line(edit)
                    found[edit] = Mutation(
                        self.name, edit.kind, self.file, line, edit.start, edit.end, edit.text, before, after
                    )
        return sorted(found.values(), key=lambda mutation: (mutation.start, mutation.kind))


def functions(package: Path) -> list[Function]:
    """The @triton.jit functions of all modules."""
    found = []
    for path in sorted(package.rglob("*.py")):
        source = Source(path.read_bytes())
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                found.append(Function(node.name, str(path.relative_to(package)), source, node))
    return found


def of_kernel(kernel: Function, known: list[Function]) -> list[Function]:
    """The kernel and the device functions that it calls, directly or not."""
    reached, new = [kernel], [kernel]
    while new:
        names = set(chain.from_iterable(function.called_names() for function in new))
        new = [function for function in known if function.name in names and function not in reached]
        reached += new
    return reached


def chosen(function: Function) -> list[Mutation]:
    """At most PER_KERNEL or PER_DEVICE_FUNCTION mutations, of as many kinds as there are."""
    order = random.Random(function.name)
    by_kind: dict[str, list[Mutation]] = {}
    for mutation in function.mutations():
        by_kind.setdefault(mutation.kind, []).append(mutation)
    kinds = sorted(by_kind)
    order.shuffle(kinds)
    kinds.sort(key=lambda kind: kind not in URGENT)
    for of_kind in by_kind.values():
        order.shuffle(of_kind)
    in_turn = chain.from_iterable(zip_longest(*(by_kind[kind] for kind in kinds)))
    most = PER_KERNEL if function.is_kernel else PER_DEVICE_FUNCTION
    picked = [mutation for mutation in in_turn if mutation is not None][:most]
    return sorted(picked, key=lambda mutation: (mutation.start, mutation.kind))


def _is_jit(decorator: ast.expr) -> bool:
    name = ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)
    return name in ("triton.jit", "jit")


def _inside(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The function itself, for its signature, and the nodes of its body, without inline assembly and assertions."""
    yield function
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _LEFT_ALONE:
            continue
        yield node
        pending[:0] = ast.iter_child_nodes(node)


# Inline assembly does not run in the interpreter; the others do not change results.
_LEFT_ALONE = {"tl.inline_asm_elementwise", "tl.static_assert", "tl.device_assert", "tl.static_print", "tl.assume"}
