"""Medians of device time, and the two ceilings that they are held against.

On a GPU: CUDA events around each call, with the queue filled ahead, so that the gaps between launches stay out; a few
sets of inputs take turns, so that none is found in the L2. On a CPU: the wall clock. Everything is timed twice, and the
difference between the two medians is the spread: what differs by less is noise.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Call = Callable[[], object]

FEWEST, MOST = 3, 200  # calls in one median
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most: for waiting
_LONGEST_WAIT = 0.2  # seconds
_TIMES_L2 = 4  # bytes that pass between two uses of the same input


@dataclass(frozen=True)
class Timing:
    ms: float
    spread: float  # |difference of two medians| / the smaller


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device for about `seconds` each."""

    device: torch.device
    seconds: float = 0.1

    def sets_of(self, size: int) -> int:
        """How many inputs of `size` bytes have to take turns."""
        if self.device.type != "cuda":
            return 1
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(_TIMES_L2 * l2 // max(size, 1), 64))

    def time(self, calls: Sequence[Call], queued: bool = True) -> Timing:
        """Of one of the calls, which take turns. `queued`: without the gaps between launches."""
        host, once = self._estimate(calls)
        count = max(FEWEST, min(MOST, int(self.seconds / 2 / max(once, 1e-7))))
        wait = min(1.5 * host * count, _LONGEST_WAIT) if queued else 0.0
        first, second = (median(self._milliseconds(calls, count, wait)) for _ in range(2))
        return Timing(min(first, second), abs(first - second) / min(first, second))

    def host_ms(self, call: Call) -> float:
        """The time until `call` returns, while the device may still be at work."""
        times = []
        for _ in range(FEWEST):
            self.wait()
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return 1e3 * median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _estimate(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Seconds of a call until it returns, and until the device is done."""
        for call in calls:
            call()
        self.wait()
        began = time.perf_counter()
        calls[0]()
        returned = time.perf_counter()
        self.wait()
        return returned - began, time.perf_counter() - began

    def _milliseconds(self, calls: Sequence[Call], count: int, wait: float) -> list[float]:
        if self.device.type != "cuda":
            return [1e3 * _seconds(calls[i % len(calls)]) for i in range(count)]
        if wait:
            torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for i, (begin, end) in enumerate(events):
            begin.record()
            calls[i % len(calls)]()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) for begin, end in events]


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run: a copy, and cuBLAS's product of bfloat16 squares."""

    copied: int  # bytes, read and written
    side: int  # of the squares
    copy: Timing
    product: Timing

    @classmethod
    def measured(cls, watch: Stopwatch, copied: int, side: int) -> "Ceilings":
        source, target = (torch.randint(256, (copied // 2,), dtype=torch.uint8, device=watch.device) for _ in range(2))
        copy = watch.time([lambda: target.copy_(source)])
        a, b = (torch.randn(side, side, device=watch.device).bfloat16() for _ in range(2))
        return cls(copied, side, copy, watch.time([lambda: a @ b]))

    def floor_ms(self, size: int, operations: int = 0, bits: int = 16) -> float:
        """The larger of two times: `size` bytes through memory, operations through the matrix units.

        These take operands of half the bits at twice the rate.
        """
        of_product = self.product.ms / (2 * self.side**3)
        return max(size * self.copy.ms / self.copied, operations * bits / 16 * of_product)
