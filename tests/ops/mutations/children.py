"""pytest in forked children of a process that has imported torch: a second instead of five for each run.

A child imports the package from a folder of its own, so that it can be a broken copy, and can crash or hang without
harm. Of the tests it runs those it is told to, in the order given.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

# What tests import: loaded here once, not in every child.
import torch
from triton.runtime.interpreter import InterpretedFunction

_FORK = multiprocessing.get_context("fork")

torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its first call imports a second's worth of torch


@dataclass(frozen=True)
class Run:
    """One call of pytest: `packages` is the folder that holds the package, `tests` node ids out of `files`."""

    root: Path
    packages: Path
    files: tuple[str, ...]
    tests: tuple[str, ...]
    stop_at_failure: bool = False
    limits: Mapping[str, float] = field(default_factory=dict, hash=False)  # seconds, by test
    limit: float = 600.0  # of what is not in `limits`, and of the time before the first test


@dataclass
class Outcome:
    """What a run said before it ended; `seconds` and `reached` (names of @triton.jit functions) by test."""

    run: Run
    collected: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, list[str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: str = ""  # the test that had begun and not ended
    ended: str = ""  # how the process ended, if not by itself
    output: str = ""


def outcomes(runs: Iterable[Run], jobs: int) -> Iterator[Outcome]:
    """Outcomes in the order in which runs end, `jobs` of them at a time; a run is asked for when it can begin."""
    waiting = iter(runs)
    running = [_Child(run) for run in islice(waiting, jobs)]
    while running:
        soonest = min(child.deadline for child in running) - time.monotonic()
        wait([child.connection for child in running], timeout=max(0.0, soonest))
        for child in [child for child in running if child.has_ended()]:
            running.remove(child)
            running += map(_Child, islice(waiting, 1))
            yield child.outcome


class _Child:
    def __init__(self, run: Run) -> None:
        self.outcome = Outcome(run)
        self.limit = run.limit
        self.deadline = time.monotonic() + self.limit
        self.connection, theirs = _FORK.Pipe(duplex=False)
        self.process: BaseProcess = _FORK.Process(target=_run_pytest, args=(run, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def has_ended(self) -> bool:
        """Reads what the child has said; ends it at its time limit."""
        try:
            while self.connection.poll():
                what, value = self.connection.recv()
                self._take(what, value)
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                self.outcome.ended = f"the process ended with {self.process.exitcode}"
            return True
        if time.monotonic() < self.deadline:
            return False
        self.process.kill()
        self.process.join()
        self.outcome.ended = f"ran into the limit of {self.limit:.0f} s"
        return True

    def _take(self, what: str, value: Any) -> None:
        outcome = self.outcome
        match what:
            case "collected":
                outcome.collected = value
            case "begins":
                outcome.running = value
                self.limit = outcome.run.limits.get(value, outcome.run.limit)
                self.deadline = time.monotonic() + self.limit
            case "ends":
                outcome.running = ""
                test, seconds, reached = value
                outcome.seconds[test], outcome.reached[test] = seconds, reached
            case "fails":
                outcome.failed.update([value])
            case "output":
                outcome.output = value


def _run_pytest(run: Run, connection: Connection) -> None:
    os.chdir(run.root)
    sys.path.insert(0, str(run.packages))
    log = os.memfd_create("output")
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to load than most tests
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-o", "addopts=--import-mode=importlib"]
    for warning in ("PytestConfigWarning", "PytestUnknownMarkWarning"):  # of settings and marks of the plugins
        options += ["-W", f"ignore::pytest.{warning}"]
    options += ["-m", "not slow and not gpu and not integration", *(["-x"] if run.stop_at_failure else [])]
    status = pytest.main([*options, *run.files], plugins=[_Reporter(run, connection)])
    sys.stdout.flush()
    os.lseek(log, 0, os.SEEK_SET)
    connection.send(("output", os.read(log, 1 << 20).decode(errors="replace")))
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(int(status))  # pytest itself failed: the package cannot be imported, say


class _Reporter:
    """A pytest plugin that chooses tests and says what becomes of them."""

    def __init__(self, run: Run, connection: Connection) -> None:
        self._run, self._connection = run, connection
        self._reached: set[str] = set()
        self._began = 0.0
        self._watch()

    def _watch(self) -> None:
        """Notes which functions the interpreter runs."""
        for method in ("run", "__call__"):
            setattr(InterpretedFunction, method, _watched(getattr(InterpretedFunction, method), self._reached))

    @pytest.hookimpl(trylast=True)  # after the marks have deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._connection.send(("collected", [item.nodeid for item in items]))
        place = {test: i for i, test in enumerate(self._run.tests)}
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._connection.send(("fails", (report.nodeid, _first_line(report))))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reached.clear()
        self._began = time.monotonic()
        self._connection.send(("begins", nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._connection.send(("fails", (report.nodeid, _first_line(report))))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._connection.send(("ends", (nodeid, time.monotonic() - self._began, sorted(self._reached))))


def _watched(method: Callable[..., Any], reached: set[str]) -> Callable[..., Any]:
    """`method`, which notes the name of the function that it is called on."""

    def watched(function: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
        reached.add(function.fn.__name__)
        return method(function, *args, **kwargs)

    return watched


def _first_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).splitlines()[0] if report.longrepr else ""
