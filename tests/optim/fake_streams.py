"""CUDA streams that run late: calls happen in any order that waiting for events allows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stream:
    """Calls in order. A call that returns False has to wait."""

    def __init__(self, device: object = None) -> None:
        self.calls: list[Callable[[], bool]] = []

    def does(self, call: Callable[[], object]) -> None:
        self.calls.append(lambda: (call(), True)[1])

    def wait_event(self, event: "Event") -> None:
        number = event.recorded
        self.calls.append(lambda: event.happened >= number)

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """The latest of its recordings counts, as in CUDA."""

    def __init__(self) -> None:
        self.recorded = self.happened = 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded += 1
        number = self.recorded
        (stream or Streams.entered[-1]).does(lambda: setattr(self, "happened", number))


class Streams:
    """In place of torch.cuda's functions; `entered[0]` is the stream that the caller is on."""

    entered: list[Stream]

    def __init__(self) -> None:
        self.all = [Stream()]
        Streams.entered = self.all[:]

    def new(self, device: object = None) -> Stream:
        self.all.append(Stream())
        return self.all[-1]

    def current(self, device: object = None) -> Stream:
        return self.entered[-1]

    @contextmanager
    def enter(self, stream: Stream) -> Iterator[None]:
        self.entered.append(stream)
        yield
        self.entered.pop()

    def late(self, function: Callable[..., object]) -> Callable[..., None]:
        """`function`, called when the stream of the caller comes to it."""
        return lambda *args: self.entered[-1].does(lambda: function(*args))

    def run(self, choose: Callable[[int], int]) -> None:
        """Everything; `choose(n)` says which of n streams goes on, as far as it can."""
        stuck = 0
        while ready := [stream for stream in self.all if stream.calls]:
            stream = ready[choose(len(ready))]
            stuck += 1
            while stream.calls and stream.calls[0]():
                stream.calls.pop(0)
                stuck = 0
            assert stuck < 1000, "the streams wait for each other"
