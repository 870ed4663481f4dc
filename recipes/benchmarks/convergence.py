"""`benchmark=convergence`: does it train as well? Paired seeds, the mean difference in bits per byte and its interval.

Each variant of a study trains a byte-level GPT from the seeds that what it is held against has, and the difference is
taken seed by seed. On GPUs each run is one of several processes that share a device, so its tokens/s are not those of a
run alone.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq_plugin.recipes.benchmarks.convergence_algorithms import learning_rate
from lq_plugin.recipes.benchmarks.convergence_run import Outcome, Task, Text, bits_of_single_bytes, train
from lq_plugin.recipes.benchmarks.convergence_statistics import interval
from lq_plugin.recipes.benchmarks.convergence_studies import SMALL, STUDIES, Study, Variant
from lq_plugin.recipes.benchmarks.convergence_workers import Failure, Work, outcomes
from lq_plugin.recipes.tasks.source_files import read_files, source_files

WORKERS_PER_GPU = 3  # one trains while others begin, validate and end
SMALL_SEEDS = 2
RUN, SUMMARY = "run", "summary"
HEAD = f"{'variant':44} {'seed':>6} {'bits/byte':>10} {'difference':>11} {'95 % interval':>18} {'diverged':>9}"

Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A run or a summary, as benchmark.py writes and prints it."""

    content: Record

    @property
    def op(self) -> str:
        return f"{self.content['variant']}, seed {self.content['seed']}"

    @property
    def problem(self) -> str | None:
        return self.content.get("problem")

    def record(self) -> Record:
        return self.content

    def row(self) -> str:
        return _summary_row(self.content) if self.content["kind"] == SUMMARY else _run_row(self.content)


@dataclass
class ConvergenceBenchmark:
    """study: "optimizers" or "formats". sizes: "full", "small", or "auto" for full ones on a GPU.

    only: variants whose name holds one of these words, and what they are held against. sweep: also at other learning
    rates than each algorithm's own. roots: of PythonSources. seeds and steps: None for the study's. workers: processes
    on each device, None for WORKERS_PER_GPU, 0 for all in this one. cuda_graph: replay the step on a GPU. A run that
    `continue_from` has seen is not done again.
    """

    study: str = "optimizers"
    sizes: str = "auto"
    only: tuple[str, ...] = ()
    sweep: bool = True
    roots: tuple[str, ...] = ("stdlib", "site-packages")
    seeds: int | None = None
    steps: int | None = None
    workers: int | None = None
    cuda_graph: bool = True
    validation_share: float = 0.05
    head: str = field(default=HEAD, init=False)
    _earlier: dict[str, Record] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"study is one of {', '.join(map(repr, STUDIES))}, got {self.study!r}")

    def continue_from(self, records: Iterable[Record]) -> list[Record]:
        """Takes the runs that an earlier benchmark wrote; the records to keep: all but this study's summaries, which
        are made again, and runs with a problem, which are done again."""
        kept = [r for r in records if not (r.get("study") == self.study and (r["kind"] == SUMMARY or r["problem"]))]
        self._earlier = {r["settings"]: r for r in kept if r.get("kind") == RUN}
        return kept

    def run(self, device: torch.device) -> Iterator[Line]:
        study = self._sized(device)
        training, validation = self._bytes()
        _check_length(training, "training", study.size.context)
        _check_length(validation, "validation", study.size.context)
        around = {"text_bytes": len(training), "text": _digest(training), "device": _name(device)}
        entropy = bits_of_single_bytes(validation)
        tasks = {
            _settings(task, around): task
            for seed in range(study.seeds)
            for variant in study.variants
            for task in (Task(variant, study.size, seed, entropy, self.cuda_graph),)
        }
        records = {settings: self._earlier[settings] for settings in tasks if settings in self._earlier}
        devices = self._devices(device)
        with tempfile.TemporaryDirectory(prefix="lq-text-") as folder:
            files = [_written(Path(folder) / name, text) for name, text in (("t", training), ("v", validation))]
            to_do = [task for settings, task in tasks.items() if settings not in records]
            prepare = partial(on_device, files=files, share=max(1, len(devices)))
            for task, outcome in outcomes(to_do, devices, prepare):
                settings = _settings(task, around)
                records[settings] = self._run_record(task, outcome, around) | {"settings": settings}
                yield Line(records[settings])
        for variant in study.variants:
            yield Line(summary(variant, records.values()) | asdict(study.size) | {"study": self.study})

    def _sized(self, device: torch.device) -> Study:
        study = STUDIES[self.study]
        full = {"full": True, "small": False, "auto": device.type == "cuda"}[self.sizes]
        size = study.size if full else SMALL
        seeds = (study.seeds if full else SMALL_SEEDS) if self.seeds is None else self.seeds
        size = size if self.steps is None else replace(size, steps=self.steps)
        variants = tuple(variant for variant in study.variants if self.sweep or variant.lr_factor == 1)
        return Study(_chosen(variants, self.only), size, seeds)

    def _devices(self, device: torch.device) -> list[str]:
        """The device of each worker."""
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        each = (WORKERS_PER_GPU if device.type == "cuda" else 0) if self.workers is None else self.workers
        return each * ([f"cuda:{i}" for i in range(count)] if device.type == "cuda" else ["cpu"])

    def _bytes(self) -> tuple[Tensor, Tensor]:
        files = source_files(list(self.roots))
        parts: tuple[list[Any], list[Any]] = [], []
        for file in files:
            parts[file.is_validation(self.validation_share)].append(file)
        training, validation = (torch.frombuffer(read_files(part) or bytearray(1), dtype=torch.uint8) for part in parts)
        return training, validation

    def _run_record(self, task: Task, outcome: Outcome | Failure, around: Record) -> Record:
        values = {} if isinstance(outcome, Failure) else asdict(outcome)
        return {
            "kind": RUN,
            "study": self.study,
            "seed": task.seed,
            **_described(task.variant),
            **asdict(task.size),
            **around,
            **{key: _finite(value) for key, value in values.items()},
            "problem": str(outcome) if isinstance(outcome, Failure) else None,
        }


def on_device(device: str, files: list[tuple[str, int]], share: int) -> Work:
    """How a worker does its tasks: with the texts on the device, which it shares the host with so many others."""
    if device != "cpu":
        torch.cuda.set_device(device)
    if share > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))
    texts = (torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path, size in files)
    return partial(_train, text=Text(*(text.to(device) for text in texts)))


def _train(task: Task, text: Text) -> Outcome:
    return train(task, text)


def summary(variant: Variant, runs: Iterable[Record]) -> Record:
    """What the runs of a variant say of it; pairs in which one diverged or failed are left out of the difference."""
    runs = list(runs)
    own = _bits(variant.name, runs)
    other = {} if variant.against is None else _bits(variant.against, runs)
    pairs = sorted(own.keys() & other.keys())
    bits = interval([own[seed] - other[seed] for seed in pairs])
    percent = interval([100 * (own[seed] / other[seed] - 1) for seed in pairs])
    mean = interval(list(own.values()))
    high = None if percent is None else percent.high
    return {
        "kind": SUMMARY,
        "seed": "all",
        **_described(variant),
        "against": variant.against,
        "n": len(pairs) if variant.against else len(own),
        "bits_per_byte": None if mean is None else mean.mean,
        "difference_bits": None if bits is None else asdict(bits),
        "difference_percent": None if percent is None else asdict(percent),
        "limit_percent": variant.limit,
        "within_limit": None if variant.limit is None or high is None else high <= variant.limit,
        "diverged": sum(bool(r.get("diverged")) for r in _of(variant.name, runs)),
        "runs": len(_of(variant.name, runs)),
        "failed": sum(r["problem"] is not None for r in _of(variant.name, runs)),
        "problem": None,
    }


def _of(name: str, runs: Iterable[Record]) -> list[Record]:
    return [record for record in runs if record["variant"] == name]


def _bits(name: str, runs: Iterable[Record]) -> dict[int, float]:
    """By seed, of the runs that came to an end and did not diverge."""
    return {r["seed"]: r["bits_per_byte"] for r in _of(name, runs) if r["problem"] is None and not r["diverged"]}


def _chosen(variants: tuple[Variant, ...], words: Iterable[str]) -> tuple[Variant, ...]:
    """Those whose name holds a word, with what they are held against, in the order of the study."""
    words = list(words)
    asked = [variant for variant in variants if not words or any(word in variant.name for word in words)]
    names = {variant.name for variant in asked} | {variant.against for variant in asked}
    return tuple(variant for variant in variants if variant.name in names)


def _check_length(text: Tensor, what: str, context: int) -> None:
    if len(text) <= context:
        raise ValueError(
            f"the {what} files hold {len(text)} bytes, a window takes {context + 1}: add folders to "
            "benchmark.roots, or change benchmark.validation_share"
        )


def _described(variant: Variant) -> Record:
    fields = asdict(variant)
    del fields["against"], fields["limit"]
    return {"variant": fields.pop("name"), "lr": learning_rate(variant), **fields}


def _settings(task: Task, around: Record) -> str:
    """The same for two runs that do the same on the same text and device; what they are held against is no part."""
    described = [_described(task.variant), asdict(task.size), task.seed, task.cuda_graph, around]
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()


def _written(path: Path, text: Tensor) -> tuple[str, int]:
    text.numpy().tofile(path)
    return str(path), len(text)


def _digest(text: Tensor) -> str:
    return hashlib.blake2b(text.numpy().data, digest_size=8).hexdigest()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _finite(value: Any) -> Any:
    """As JSON knows numbers: None for NaN and infinities."""
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _run_row(record: Record) -> str:
    head = f"{record['variant']:44} {record['seed']:>6}"
    if record["problem"] is not None:
        return f"{head} {record['problem']}"
    bits = "not finite" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f}"
    timing = f"{record['ms_per_step']:.1f} ms a step, {record['tokens_per_second']:,.0f} tokens/s"
    return f"{head} {bits:>10} {'diverged' if record['diverged'] else '':>40}  {timing}"


def _summary_row(record: Record) -> str:
    bits = "" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.4f}"
    difference, between = "", ""
    if (percent := record["difference_percent"]) is not None:
        difference = f"{percent['mean']:+.3f} %"
        between = "" if percent["low"] is None else f"{percent['low']:+.3f} .. {percent['high']:+.3f}"
    diverged = f"{record['diverged']} of {record['runs']}"
    failed = f"  {record['failed']} failed" if record["failed"] else ""
    pairs = f"n={record['n']}"
    return f"{record['variant']:44} {pairs:>6} {bits:>10} {difference:>11} {between:>18} {diverged:>9}{failed}"
