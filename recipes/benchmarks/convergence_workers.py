"""Processes that each take the next task, several for each device; the end of one is the failure of its task alone."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Work = Callable[[Any], Any]  # a task -> its outcome
Prepare = Callable[[str], Work]  # the name of a device -> how its tasks are done there; pickled

LONGEST_ERROR = 300
_PATIENCE = 10.0  # seconds until a process that was told to end is ended


class Failure(str):
    """Why a task has no outcome."""


def attempt(work: Work, task: Any) -> Any:
    """The outcome, or the failure: other tasks are done all the same."""
    try:
        return work(task)
    except Exception as error:
        return Failure(" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR])


def outcomes(tasks: Sequence[Any], devices: Sequence[str], prepare: Prepare) -> Iterator[tuple[Any, Any]]:
    """(task, outcome or Failure) in the order in which they are done, by a process for each entry of `devices`.

    Without devices all is done in this process, on the CPU. A process that dies is replaced, and so is one whose task
    failed: after some errors a GPU does nothing more for the process that met them.
    """
    if not devices:
        work = prepare("cpu")
        yield from ((task, attempt(work, task)) for task in tasks)
        return
    waiting = list(reversed(tasks))
    busy: dict[Connection, tuple[_Worker, Any]] = {}
    try:
        for device in devices[: len(tasks)]:
            _give_next(_Worker(device, prepare), waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                worker, task = busy.pop(connection)  # type: ignore[call-overload]
                outcome, worker = worker.result(prepare if waiting else None)
                if worker is not None:
                    _give_next(worker, waiting, busy)
                yield task, outcome
    finally:
        for worker, _ in busy.values():
            worker.end()


def _give_next(worker: "_Worker", waiting: list[Any], busy: dict[Connection, tuple["_Worker", Any]]) -> None:
    if not waiting:
        worker.end()
        return
    task = waiting.pop()
    worker.send(task)
    busy[worker.connection] = worker, task


class _Worker:
    def __init__(self, device: str, prepare: Prepare) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.device = device
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(other, device, prepare), daemon=True)
        self.process.start()
        other.close()  # so that its end is seen here

    def send(self, task: Any) -> None:
        try:
            self.connection.send(task)
        except BrokenPipeError:  # it has died already: `result` says so
            return

    def result(self, prepare: Prepare | None) -> tuple[Any, "_Worker | None"]:
        """The outcome and the process for the next task: this one, or after a failure another, if `prepare`."""
        try:
            outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            outcome = Failure(f"its process ended with exit code {self.process.exitcode}")
        if not isinstance(outcome, Failure):
            return outcome, self
        self.end()
        return outcome, None if prepare is None else _Worker(self.device, prepare)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection: Connection, device: str, prepare: Prepare) -> None:
    """Does tasks until the other end is closed. What `prepare` raises is the failure of each task."""
    work = attempt(prepare, device)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work if isinstance(work, Failure) else attempt(work, task))
