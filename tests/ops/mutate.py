"""Breaks each Triton kernel in turn and reports which tests notice.

    python tests/ops/mutate.py [--kernel NAME ...] [--tests FILE ...] [--jobs N] [--seconds N] [--json FILE]

First every test of tests/ops, those marked thorough too, runs once, in Triton's interpreter, to see which @triton.jit
functions it reaches and how long it takes. Then each mutation is written into a copy of the package, and the tests that
reach the broken function run against it, the fastest first, until one fails. A crash, and a test that takes many times
its time, count as noticed. What is explained comes last: all its tests run, unless --seconds are over by then.
The status is 1 when a mutation survives that `mutations/explained.py` does not explain.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch: the interpreter, on a machine with a GPU too, and one thread, since a fork keeps one.
os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

from mutations.children import Outcome, Run, outcomes
from mutations.explained import explanation
from mutations.sources import Mutation, chosen, functions, of_kernel

ROOT = Path(__file__).parents[2]
START_SECONDS, PATIENCE = 20.0, 6.0  # the limit of a test: the first, and so many times what it takes
LEFT_OUT = ("test_mutate.py", "test_compile.py")  # of the tests: they would run this, or take long and run no kernel


@dataclass(frozen=True)
class Verdict:
    """`noticed_by`: a test, or how the process ended; `explained`: why none could; both None for a survivor."""

    mutation: Mutation
    noticed_by: str | None
    explained: str | None
    tests: int  # that ran

    @property
    def survived(self) -> bool:
        return self.noticed_by is None and self.explained is None

    def __str__(self) -> str:
        fate = self.noticed_by or (f"explained: {self.explained}" if self.explained else f"SURVIVED {self.tests} tests")
        return f"{self.mutation.function:24} | {self.mutation} | {' '.join(fate.split())[:160]}"


@dataclass(frozen=True)
class Bench:
    """A package, and for each test the seconds that it takes and the functions that it reaches, nothing broken."""

    root: Path
    package: Path
    jobs: int
    seconds: dict[str, float]
    reached: dict[str, list[str]]

    def tests_of(self, function: str) -> list[str]:
        tests = [test for test, names in self.reached.items() if function in names]
        return sorted(tests, key=lambda test: self.seconds[test])

    def verdicts(self, mutations: list[Mutation], deadline: float = math.inf) -> Iterator[Verdict]:
        """In the order in which they come; what is explained comes last and does not begin after the deadline."""
        runs: dict[Run, Mutation] = {}
        left: list[Mutation] = []

        def prepared() -> Iterator[Run]:
            for number, mutation in enumerate(sorted(mutations, key=self._place)):
                tests = self.tests_of(mutation.function)
                if tests and (time.monotonic() < deadline or not explained(mutation)):
                    run = self._prepared(Path(folder) / str(number), mutation, tests)
                    runs[run] = mutation
                    yield run
                else:
                    left.append(mutation)

        with tempfile.TemporaryDirectory() as folder:
            for outcome in outcomes(prepared(), self.jobs):
                shutil.rmtree(outcome.run.packages)
                yield verdict(runs[outcome.run], outcome)
        yield from (verdict(mutation, None) for mutation in left)

    def _place(self, mutation: Mutation) -> tuple[bool, float]:
        """What is explained last, and of that the longest first, so that all processes end at about the same time."""
        if not explained(mutation):
            return False, 0.0
        return True, -sum(self.seconds[test] for test in self.tests_of(mutation.function))

    def _prepared(self, folder: Path, mutation: Mutation, tests: list[str]) -> Run:
        copy = folder / self.package.name
        shutil.copytree(self.package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        mutation.apply(copy)
        limits = {test: START_SECONDS + PATIENCE * self.seconds[test] for test in tests}
        return Run(self.root, folder, files_of(tests), tuple(tests), stop_at_failure=True, limits=limits)


def explained(mutation: Mutation) -> str | None:
    return explanation(mutation.function, mutation.kind, mutation.before)


def verdict(mutation: Mutation, outcome: Outcome | None) -> Verdict:
    """`outcome` is None where no test reaches the function, or none ran."""
    noticed_by = None
    if outcome is not None and outcome.failed:
        noticed_by = "{}: {}".format(*next(iter(outcome.failed.items())))
    elif outcome is not None and outcome.ended:
        noticed_by = f"{outcome.running}: {outcome.ended}"
    return Verdict(
        mutation, noticed_by, None if noticed_by else explained(mutation), tests=len(outcome.seconds) if outcome else 0
    )


def undisturbed(root: Path, package: Path, tests: list[Path], jobs: int) -> Bench:
    """Runs the tests of files and folders against the package as it is; those that fail are named and left out."""
    found = [path for place in tests for path in (sorted(place.glob("test_*.py")) if place.is_dir() else [place])]
    files = tuple(str(path.resolve().relative_to(root)) for path in found if path.name not in LEFT_OUT)
    (collection,) = outcomes([Run(root, package.parent, files, tests=())], 1)
    parts = [tuple(collection.collected[part::jobs]) for part in range(jobs)]
    bench = Bench(root, package, jobs, {}, {})
    for outcome in outcomes([Run(root, package.parent, files_of(part), part) for part in parts if part], jobs):
        if outcome.ended or not outcome.seconds:
            raise SystemExit(f"the tests end before anything is broken: {outcome.ended}\n{outcome.output[-3000:]}")
        for test, message in outcome.failed.items():
            print(f"left out, since it fails before anything is broken: {test}: {message}", flush=True)
        for test in outcome.seconds.keys() - outcome.failed.keys():
            bench.seconds[test], bench.reached[test] = outcome.seconds[test], outcome.reached[test]
    if not bench.seconds:
        raise SystemExit(f"no tests in {', '.join(map(str, tests))}:\n{collection.output[-3000:]}")
    return bench


def files_of(tests: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({test.partition("::")[0] for test in tests}))


def planned(package: Path, kernels: list[str]) -> list[Mutation]:
    """The mutations of all functions, or of these kernels and what they call."""
    known = functions(package)
    if unknown := set(kernels) - {function.name for function in known}:
        raise SystemExit(f"no @triton.jit function is called {', '.join(sorted(unknown))}")
    named = [function for function in known if function.name in kernels]
    wanted = {of.name for function in named for of in of_kernel(function, known)}
    return [m for function in known if not kernels or function.name in wanted for m in chosen(function)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=[], help="break only these and the functions that they call")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="then what is explained is believed")
    parser.add_argument("--json", type=Path, help="a file for the table, one JSON object a line")
    parser.add_argument("--package", type=Path, default=ROOT / "kernels" / "lq_kernels")
    parser.add_argument("--tests", nargs="+", type=Path, default=[ROOT / "tests" / "ops"], help="folders and files")
    arguments = parser.parse_args()
    root = Path(os.path.commonpath([path.resolve() for path in (arguments.package, *arguments.tests)]))
    mutations = planned(arguments.package, arguments.kernel)
    began = time.monotonic()
    bench = undisturbed(root, arguments.package, arguments.tests, arguments.jobs)
    print(f"{len(bench.seconds)} tests, {time.monotonic() - began:.0f} s; {len(mutations)} mutations", flush=True)
    verdicts = []
    for one in bench.verdicts(mutations, deadline=began + arguments.seconds):
        print(one, flush=True)
        verdicts.append(one)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(asdict(one)) + "\n" for one in verdicts))
    return summary(verdicts, time.monotonic() - began)


def summary(verdicts: list[Verdict], seconds: float) -> int:
    """Prints what was not noticed; the status to exit with."""
    survivors = [one for one in verdicts if one.survived]
    believed = [one for one in verdicts if one.explained]
    for title, group in (("explained", believed), ("SURVIVED", survivors)):
        print(f"\n{title}: {len(group)}")
        for one in sorted(group, key=lambda one: (one.mutation.file, one.mutation.start)):
            print(one)
    noticed = len(verdicts) - len(survivors) - len(believed)
    unseen = sum(one.tests == 0 for one in believed)
    fates = f"{noticed} noticed, {len(believed)} explained ({unseen} of them did not run), {len(survivors)} survived"
    print(f"\n{len(verdicts)} mutations: {fates}; {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
