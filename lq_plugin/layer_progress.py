"""A progress bar over the layers of a model that is being loaded; nothing where nobody watches."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class LayerProgress:
    """Used in a `with` block; `visible` shows it on stderr, if that is a terminal."""

    def __init__(self, what: str, visible: bool) -> None:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeElapsedColumn())
        hidden = not (visible and sys.stderr.isatty())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True)
        self._task = self._bar.add_task(what, total=None)

    def expect(self, layers: int | None) -> None:
        """How many layers there will be; None: not known."""
        self._bar.update(self._task, total=layers)

    def advance(self) -> None:
        self._bar.advance(self._task)

    def __enter__(self) -> "LayerProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
