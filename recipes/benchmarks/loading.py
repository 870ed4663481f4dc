"""`benchmark=loading`: a checkpoint of an 8B-shaped Llama with random weights, quantised while it is read (goal M4).

The checkpoint is written first, on the disk of the machine that measures: 16 GB of safetensors in bfloat16. Then each
way to load it runs in a process of its own: seconds, what the model takes, and the peak while it was loaded.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from lq_plugin.recipes.benchmarks.case_process import run_process
from lq_plugin.recipes.benchmarks.training_steps_cases import SHAPES, SMALL, Shape

HEAD = f"{'case':5} {'how':44} {'seconds':>8} {'GB':>8} {'peak GB':>8} {'beyond, MB':>10}  loss"
_CHILD = "lq_plugin.recipes.benchmarks.loading_case"
_SHAPE = "E3, one row"


@dataclass(frozen=True)
class LoadCase:
    """who: "ours", "bitsandbytes", or "convert", which loads in bfloat16 and converts then. linear: a frozen format.

    cache: ours, through a folder of quantised layers: the first such case fills it, the next one reads it.
    """

    what: str
    who: str
    linear: str
    cache: bool = False


def load_cases() -> Iterator[LoadCase]:
    for linear in ("nf4", "nf4_dq", "llm_int8"):
        yield LoadCase(f"our {linear}", "ours", linear)
        yield LoadCase(f"transformers + bitsandbytes {linear}", "bitsandbytes", linear)
    yield LoadCase("bfloat16, then our convert to nf4", "convert", "nf4")
    yield LoadCase("our nf4, filling the cache", "ours", "nf4", cache=True)
    yield LoadCase("our nf4, from the cache", "ours", "nf4", cache=True)


@dataclass(frozen=True)
class LoadResult:
    """What loading took, or its problem."""

    case: LoadCase
    shape: Shape
    measured: dict[str, Any]
    problem: str | None = None

    @property
    def op(self) -> str:
        return f"M4 {self.case.what}"

    def record(self) -> dict[str, Any]:
        shape = {"shape": asdict(self.shape), "parameters": self.shape.parameters}
        return {"name": "M4"} | asdict(self.case) | shape | self.measured | {"problem": self.problem}

    def row(self) -> str:
        head = f"{'M4':5} {self.case.what:44}"
        if self.problem is not None:
            return f"{head} {self.problem}"
        it = self.measured
        held = peak = beyond = ""
        if it["peak_bytes"] is not None:
            held, peak = f"{it['model_bytes'] / 1e9:.2f}", f"{it['peak_bytes'] / 1e9:.2f}"
            beyond = f"{(it['peak_bytes'] - it['model_bytes']) / 1e6:.0f}"
        return f"{head} {it['seconds']:8.2f} {held:>8} {peak:>8} {beyond:>10}  {it['loss']:.3f}"


@dataclass(frozen=True)
class LoadingBenchmark:
    """sizes: "full", "small", or "auto" for full ones on a GPU. only: cases whose text holds one of these words.
    folder: where the checkpoint is written, as a new folder that is removed in the end; None is where temporary files
    go. patience: seconds until a case that has not ended is ended."""

    sizes: str = "auto"
    only: tuple[str, ...] = ()
    folder: str | None = None
    patience: float = 300
    head: str = field(default=HEAD, init=False)

    def run(self, device: torch.device) -> Iterator[LoadResult]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        shape = (SHAPES if full else SMALL)[_SHAPE]
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            _, unwritten = self._ask(folder, {"write": asdict(shape)})
            for case in load_cases():
                if self.only and not any(word in f"M4 {case.what}" for word in self.only):
                    continue
                if unwritten is not None:
                    yield LoadResult(case, shape, {}, f"the checkpoint could not be written: {unwritten}")
                    continue
                measured, problem = self._ask(folder, {"load": asdict(case)})
                if problem is None and not isfinite(measured["loss"]):
                    measured, problem = {}, f"the loss of the model is {measured['loss']}"
                yield LoadResult(case, shape, measured, problem)

    def _ask(self, folder: str, asked: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        return run_process(_CHILD, asked | {"folder": folder}, self.patience, {"HF_HUB_OFFLINE": "1"})
