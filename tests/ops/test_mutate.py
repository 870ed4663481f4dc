"""The mutation tool, on a package with one kernel and tests that look away once."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lq_kernels
import pytest
from mutations.children import Run, outcomes
from mutations.explained import explanation
from mutations.rules import RULES, Source
from mutations.sources import PER_DEVICE_FUNCTION, PER_KERNEL, Function, Mutation, chosen, functions, of_kernel

pytest.importorskip("triton")

pytestmark = pytest.mark.thorough

PACKAGE = Path(lq_kernels.__path__[0])
FUNCTIONS = functions(PACKAGE)

TOY = """
import triton
import triton.language as tl

@triton.jit
def _doubled(x):
    return x * 2

@triton.jit
def _double_kernel(x_ptr, out_ptr, n, stride_x, stride_out, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE).to(tl.int64)
    x = tl.load(x_ptr + offset * stride_x, mask=offset < n, other=0.0)
    tl.store(out_ptr + offset * stride_out, _doubled(x), mask=offset < n)

@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)

def double(x, out):
    _double_kernel[(1,)](x, out, len(x), x.stride(0), out.stride(0), SIZE=4)
"""

TESTS = """
import torch
from toy import double

def test_values_are_doubled():
    x, out = torch.tensor([1.0, -3.0, 5.0]), torch.zeros(4)
    double(x, out[:3])
    assert out.tolist() == [2.0, -6.0, 10.0, 0.0]

def test_that_fails():
    assert False

def test_that_has_nothing_to_do_with_it():
    pass
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root / packages / toy, root / tests: the kernel and its test."""
    root = tmp_path_factory.mktemp("root")
    (root / "packages" / "toy").mkdir(parents=True)
    (root / "packages" / "toy" / "__init__.py").write_text(TOY)
    (root / "tests").mkdir()
    (root / "tests" / "test_toy.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n slow\n gpu\n integration\n")
    return root


def edits(code: str) -> list[tuple[str, str]]:
    """(kind, changed code) of each edit of the function in `code`, whose body is indented by four."""
    source = Source(code.encode())
    found = []
    for function in functions_of(source):
        for mutation in function.mutations():
            found.append((mutation.kind, changed(code, mutation)))
    return found


def changed(code: str, mutation: Mutation) -> str:
    return code[: mutation.start] + mutation.replacement + code[mutation.end :]


def functions_of(source: Source) -> list[Function]:
    return [
        Function(node.name, "toy.py", source, node) for node in source.tree.body if isinstance(node, ast.FunctionDef)
    ]


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        (
            "x = tl.load(p, mask=a < b, other=0.0)",
            "mask dropped",
            "x = tl.load(p, mask=((a < b) == (a < b)), other=0.0)",
        ),
        ("x = tl.load(p, mask=m, other=0.0)", "other changed", "x = tl.load(p, mask=m, other=1)"),
        ('x = tl.load(p, mask=m, other=float("inf"))', "other changed", "x = tl.load(p, mask=m, other=0)"),
        ("m = rows & (k < K)", "half of a mask dropped", "m = rows & (((k < K) == (k < K)))"),
        ("m = (row) < M", "< to <=", "m = (row) <= M"),
        ("m = row < M", "threshold off by one", "m = row < (M - 1)"),
        ("i = tl.arange(0, N)", "offset off by one", "i = (tl.arange(0, N) + 1)"),
        ("x = (a + b) * (c)", "* to +", "x = (a + b) + (c)"),
        ("x //= y", "// to %", "x %= y"),
        ("x = codes * scale[:, None]", "scale dropped", "x = (codes)"),
        ("out *= tl.load(scale_ptr)", "scale dropped", "pass"),
        ("x = tl.max(bits, axis=1)", "max to min", "x = tl.min(bits, axis=1)"),
        ("x = tl.div_rn(a, b + c)", "division by reciprocal", "x = ((a) * (1.0 / (b + c)))"),
        ("x = int8_nearest(a * b)", "truncated, not rounded", "x = (a * b).to(tl.int8)"),
        ("x = y + ROUNDING_OFFSET", "rounding moved", "x = y + (ROUNDING_OFFSET + 1.0)"),
        ("x = tl.where(c, a, b)", "branches of where swapped", "x = tl.where(c, b, a)"),
        ("x = v > 3", "constant changed", "x = v > 4"),
        ("tl.store(p, x)", "store dropped", "pass"),
        ("p += step", "statement dropped", "pass"),
        ("x = tl.where(x < 0, 0, x)", "statement dropped", "pass"),
        ("x = row.to(tl.int64)", "int64 cast dropped", "x = (row)"),
        ("x = y.to(tl.int32, bitcast=True)", "bitcast to cast", "x = (y).to(tl.int32)"),
        ("x = 1 if FLAG else 2", "condition negated", "x = 1 if not (FLAG) else 2"),
    ],
)
def test_each_kind_of_mistake_is_written_into_the_source(line: str, kind: str, expected: str) -> None:
    head = "def f(p):\n    "
    assert (kind, head + expected) in edits(head + line)


def test_strides_are_swapped_in_the_signature_and_loops_lose_their_ends() -> None:
    assert edits("def f(x, stride_am, stride_ak, K):\n    pass") == [
        ("strides swapped", "def f(x, stride_ak, stride_am, K):\n    pass")
    ]
    assert edits("def f():\n    for i in range(0, K, B):\n        pass") == [
        ("first step skipped", "def f():\n    for i in range(0 + B, K, B):\n        pass"),
        ("last step skipped", "def f():\n    for i in range(0, K - B, B):\n        pass"),
    ]


def test_offsets_count_bytes_where_the_source_has_other_letters() -> None:
    source = Source("def f(x):\n    '''± µ'''\n    y = 'é' if x < 3 else 1".encode())
    (function,) = functions_of(source)
    kinds = {mutation.kind: source.code[mutation.start : mutation.end] for mutation in function.mutations()}
    assert kinds["constant changed"] == b"3"


def test_inline_assembly_is_left_alone() -> None:
    assert edits("def f(x):\n    x = tl.inline_asm_elementwise('prmt', [x + 1])") == [
        ("statement dropped", "def f(x):\n    pass")
    ]


def test_every_kernel_is_broken_in_at_least_five_ways() -> None:
    kernels = [function for function in FUNCTIONS if function.is_kernel]
    assert len(kernels) > 8
    for kernel in kernels:
        assert sum(len(chosen(function)) for function in of_kernel(kernel, FUNCTIONS)) >= 5, kernel.name


def test_choices_are_few_of_different_kinds_and_always_the_same() -> None:
    for function, again in zip(FUNCTIONS, functions(PACKAGE), strict=True):
        choice = chosen(function)
        assert choice == chosen(again)
        assert len(choice) <= (PER_KERNEL if function.is_kernel else PER_DEVICE_FUNCTION)
        kinds = {mutation.kind for mutation in function.mutations()}
        assert len({mutation.kind for mutation in choice}) == min(len(choice), len(kinds))
    assert len({mutation.kind for function in FUNCTIONS for mutation in chosen(function)}) > len(RULES)


def test_broken_kernels_are_python() -> None:
    for function in FUNCTIONS:
        for mutation in chosen(function):
            code = function.source.code
            broken = code[: mutation.start] + mutation.replacement.encode() + code[mutation.end :]
            compile(broken, str(mutation), "exec")


def test_an_explanation_may_hold_for_every_function() -> None:
    assert "2^31" in (explanation("_any_kernel", "int64 cast dropped", "row.to(tl.int64)") or "")
    assert "promise" in (explanation("pointer", "condition negated", "ALIGNED") or "")
    assert explanation("_any_kernel", "< to <=", "row < M") is None


def mutate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("mutate.py")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def broken(toy: Path) -> tuple[str, int, Callable[[str, str], dict[str, Any]]]:
    """What the tool prints for the toy, its status, and its verdict by kind and function."""
    table = toy / "table.jsonl"
    child = mutate("--package", toy / "packages" / "toy", "--tests", toy / "tests", "--jobs", 2, "--json", table)
    assert table.exists(), child.stdout + child.stderr
    rows = [json.loads(line) for line in table.read_text().splitlines()]

    def of(kind: str, function: str) -> dict[str, Any]:
        return next(r for r in rows if (r["mutation"]["kind"], r["mutation"]["function"]) == (kind, function))

    return child.stdout, child.returncode, of


def test_a_broken_kernel_is_noticed_by_the_test_that_reaches_it(broken) -> None:
    output, _, of = broken
    for kind, function in (("store dropped", "_double_kernel"), ("* to +", "_doubled")):
        assert of(kind, function)["noticed_by"].startswith("tests/test_toy.py::test_values_are_doubled: ")
        assert of(kind, function)["tests"] == 1
    assert "left out, since it fails before anything is broken: tests/test_toy.py::test_that_fails" in output


def test_what_is_explained_does_not_count_as_a_survivor(broken) -> None:
    output, _, of = broken
    row = of("int64 cast dropped", "_double_kernel")
    assert (row["noticed_by"], row["tests"]) == (None, 1)
    assert "2^31" in row["explained"]
    assert "1 explained (0 of them did not run)" in output


def test_what_no_test_notices_survives_and_fails_the_run(broken) -> None:
    output, status, of = broken
    unseen = of("other changed", "_double_kernel")  # what is loaded beyond the mask is not stored
    assert (unseen["noticed_by"], unseen["explained"]) == (None, None)
    assert of("store dropped", "_forgotten_kernel")["tests"] == 0
    assert "other=0.0" in output.partition("SURVIVED: ")[2]
    assert status == 1


def test_a_test_that_does_not_end_is_ended_at_its_limit(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_toy.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    tests = ("test_toy.py::test_a", "test_toy.py::test_b")
    run = Run(tmp_path, tmp_path, ("test_toy.py",), tests, limits={tests[1]: 0.2})
    (outcome,) = outcomes([run], 1)
    assert list(outcome.seconds) == [tests[0]]
    assert outcome.running == tests[1]
    assert "limit" in outcome.ended


def test_runs_are_asked_for_when_they_can_begin(tmp_path: Path) -> None:
    (tmp_path / "test_toy.py").write_text("def test_a(): pass\n")
    asked = []

    def runs() -> Iterator[Run]:
        for number in range(4):
            asked.append(number)
            yield Run(tmp_path, tmp_path, ("test_toy.py",), ("test_toy.py::test_a",), limit=60.0 + number)

    ended = 0
    for outcome in outcomes(runs(), 2):
        ended += 1
        assert list(outcome.seconds) == ["test_toy.py::test_a"]
        assert len(asked) <= 2 + ended
    assert (ended, asked) == (4, [0, 1, 2, 3])


def test_the_checkout_stays_as_it_is(broken, toy: Path) -> None:
    assert (toy / "packages" / "toy" / "__init__.py").read_text() == TOY


def test_an_unknown_kernel_is_an_error() -> None:
    child = mutate("--kernel", "_no_such_kernel")
    assert child.returncode == 1
    assert "no @triton.jit function is called _no_such_kernel" in child.stderr


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_no_mutation_of_the_rowwise_kernel_survives() -> None:
    child = mutate("--kernel", "_rowwise_kernel", "--jobs", 2)
    assert child.returncode == 0, child.stdout[-5000:] + child.stderr
