"""`benchmark=training_steps`: whole training steps of Llama-shaped models, tokens/s and peak memory, beside others.

    E1   1B-shaped, 8 x 2048 tokens        E2   8B-shaped, 2 x 2048 tokens, activation checkpointing
    M1   the model of E2, memory: optimizers whose state is in 8 bits
    E3   8B-shaped, LoRA on a frozen base: 4 x 2048 tokens with activation checkpointing, 1 x 2048 without
    E4   70B-shaped, LoRA on a frozen base, 1 x 4096 tokens, activation checkpointing; its memory is M2

bfloat16 weights, transformers' Llama, attention by SDPA. Each case is a process of its own, one at a time on a GPU.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import isfinite
from queue import SimpleQueue
from typing import Any

import torch

from lq_plugin.recipes.benchmarks.case_process import run_process
from lq_plugin.recipes.benchmarks.training_steps_cases import SHAPES, SMALL, Case, cases

HEAD = f"{'case':5} {'how':60} {'ms':>9} {'tokens/s':>9} {'peak GB':>8} {'B/param':>8}  loss"
_CHILD = "lq_plugin.recipes.benchmarks.training_steps_case"


@dataclass(frozen=True)
class StepResult:
    """What a case measured, or its problem."""

    case: Case
    measured: dict[str, Any]
    problem: str | None = None

    @property
    def op(self) -> str:
        return f"{self.case.name} {self.case.what}"

    def record(self) -> dict[str, Any]:
        versions = self.measured.get("versions", {})
        values = {key: value for key, value in self.measured.items() if key != "versions"}
        return asdict(self.case) | {"tokens": self.case.shape.tokens} | values | versions | {"problem": self.problem}

    def row(self) -> str:
        head = f"{self.case.name:5} {self.case.what:60}"
        if self.problem is not None:
            return f"{head} {self.problem}"
        it = self.measured
        peak = each = ""
        if it["peak_bytes"] is not None:
            peak, each = f"{it['peak_bytes'] / 1e9:.2f}", f"{it['peak_bytes'] / it['parameters']:.2f}"
        losses = " -> ".join(f"{loss:.3f}" for loss in it["losses"])
        return f"{head} {it['ms']:9.1f} {it['tokens_per_second']:9.0f} {peak:>8} {each:>8}  {losses}"


@dataclass(frozen=True)
class TrainingStepsBenchmark:
    """sizes: "full", "small", or "auto" for full ones on a GPU. only: cases whose name and text hold one of these
    words. steps: timed ones of each case. patience: seconds until a case that has not ended is ended. gpus: how many
    take cases at the same time, each the next."""

    sizes: str = "auto"
    only: tuple[str, ...] = ()
    steps: int = 5
    patience: float = 300
    gpus: int = 1
    head: str = field(default=HEAD, init=False)

    def run(self, device: torch.device) -> Iterator[StepResult]:
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        free: SimpleQueue[str] = SimpleQueue()
        for gpu in visible_gpus(self.gpus):
            free.put(gpu)

        def on_a_free_gpu(case: Case) -> StepResult:
            gpu = free.get()
            try:
                return run_case(case, self.steps, self.patience, gpu)
            finally:
                free.put(gpu)

        with ThreadPoolExecutor(self.gpus) as pool:
            yield from pool.map(on_a_free_gpu, self.cases(full))

    def cases(self, full: bool) -> Iterator[Case]:
        for case in cases(SHAPES if full else SMALL):
            if not self.only or any(word in f"{case.name} {case.what}" for word in self.only):
                yield case


def visible_gpus(count: int) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, of those that this process sees; the first for each of `count`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(max(torch.cuda.device_count(), 1))]
    if not 1 <= count <= len(names):
        raise ValueError(f"gpus is from 1 to {len(names)}, which is how many this process sees, got {count}")
    return names[:count]


def run_case(case: Case, steps: int, patience: float, gpu: str) -> StepResult:
    """In a process of its own that sees one GPU; whatever its end, a result."""
    asked = {"case": asdict(case), "steps": steps}
    measured, problem = run_process(_CHILD, asked, patience, {"CUDA_VISIBLE_DEVICES": gpu})
    if problem is None and not all(map(isfinite, measured["losses"])):
        return StepResult(case, {}, f"the loss went from {measured['losses'][0]} to {measured['losses'][1]}")
    return StepResult(case, measured, problem)
