"""Kills a training run again and again and compares it with one that nobody disturbed.

`python -m recipes.benchmarks.faults --kills 10`: SIGKILL to the whole process group at random moments, of start-up, of
steps and of saves, and `resume=auto` in the same folder each time. After each kill every checkpoint must be whole and
no step older than the last checkpoint lost; in the end losses, weights and optimizer state must be equal to the last
bit and no partial file be left. Prints a line for each kill and writes JSON lines.
"""

import argparse
import json
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from lq_plugin.checkpoint_io import AtomicCheckpointIO, check
from lq_plugin.recipes.benchmarks.killed_run import PHASES, Plan, TrainingProcess, losses
from lq_plugin.recipes.launch.resume import CHECKPOINTS

STEPS_PER_KILL = 16  # more than a run gets on until it is killed
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")

Record = dict[str, Any]


class FaultError(RuntimeError):
    """A run that did not survive a kill as it should have."""


def run_faults(folder: Path, kills: int, seed: int, every: int = 4) -> Iterator[Record]:
    """One record for each kill and one for the whole; FaultError for the first thing that is not as it should be."""
    plan = Plan(STEPS_PER_KILL * (kills + 1), every)
    random_numbers = random.Random(seed)
    phases = list(islice(cycle(PHASES), kills))
    random_numbers.shuffle(phases)
    folder.mkdir(parents=True, exist_ok=True)
    undisturbed = TrainingProcess(plan, folder / "undisturbed", folder / "undisturbed.log")
    undisturbed.wait_for(lambda: undisturbed.has_stepped)
    start_up_seconds = time.monotonic() - undisturbed.started
    undisturbed.finish()
    expected = losses(undisturbed.metrics)
    for number, phase in enumerate(phases, start=1):
        process = TrainingProcess(plan, folder / "killed", folder / f"killed_{number}.log")
        actual = process.kill_in(phase, random_numbers, start_up_seconds)
        yield {
            "kill": number,
            "phase": actual,
            "seconds_after_start": round(time.monotonic() - process.started, 3),
            "partial_bytes": [path.stat().st_size for path in process.partials()],
            **state_after_kill(process, plan, expected),
        }
    process = TrainingProcess(plan, folder / "killed", folder / f"killed_{kills + 1}.log")
    process.finish()
    yield compare(undisturbed, process, plan, expected)


def state_after_kill(process: TrainingProcess, plan: Plan, expected: dict[int, str]) -> Record:
    """Steps done and kept; FaultError unless all files are whole, what is logged is right and enough is kept."""
    logged = losses(process.metrics)
    if any(expected[step] != loss for step, loss in logged.items()):
        raise FaultError(f"a loss in {process.metrics} differs from the undisturbed run's")
    checkpoints = sorted((process.folder / CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in checkpoints:
        check(path)
    kept = AtomicCheckpointIO().load_checkpoint(checkpoints[-1])["global_step"] if checkpoints else 0
    # The last logged step may be the one whose checkpoint was being written; those before it are done with.
    at_least = (len(logged) - 1) // plan.every * plan.every
    if kept < at_least:
        raise FaultError(f"{len(logged)} steps were logged and only {kept} kept, expected at least {at_least}")
    if kept > len(logged):
        raise FaultError(f"only {len(logged)} of the {kept} steps before the checkpoint were logged")
    return {"whole_checkpoints": len(checkpoints), "steps_logged": len(logged), "resumes_from_step": kept}


def compare(undisturbed: TrainingProcess, process: TrainingProcess, plan: Plan, expected: dict[int, str]) -> Record:
    """The last record; FaultError unless both runs are the same to the last bit and nothing is left over."""
    if sorted(expected) != list(range(plan.steps)) or losses(process.metrics) != expected:
        raise FaultError(f"losses in {process.metrics} differ from those in {undisturbed.metrics}")
    runs = (undisturbed, process)
    whole, resumed = (AtomicCheckpointIO().load_checkpoint(run.folder / CHECKPOINTS / "last.ckpt") for run in runs)
    for key in COMPARED:
        if not same(whole[key], resumed[key]):
            raise FaultError(f"{key} of the last checkpoint differs from the undisturbed run's")
    if left := list(process.folder.rglob("*.partial")):
        raise FaultError(f"partial files are left: {left}")
    return {"finished": True, "steps": plan.steps, "losses_equal": len(expected), "last_checkpoint_equal": True}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, in nested dicts and lists too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def circumstances() -> Record:
    """Command, date, hardware and versions: the first line of the file."""
    cpu_info = Path("/proc/cpuinfo")  # Linux; elsewhere the name of the architecture has to do
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "command": shlex.join(["python", "-m", "recipes.benchmarks.faults", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "lightning")},
    }


def line(record: Record) -> str:
    if "finished" in record:
        return f"finished: {record['losses_equal']} losses and the last checkpoint are equal to the last bit"
    return (
        f"kill {record['kill']:2}  {record['seconds_after_start']:6.2f} s after its start, in {record['phase']:8}  "
        f"{record['steps_logged']:4} steps logged, resumes from step {record['resumes_from_step']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of phases and moments")
    parser.add_argument("--output", type=Path, help="a file for JSON lines")
    arguments = parser.parse_args()
    records = [circumstances()]
    with tempfile.TemporaryDirectory() as folder:
        for record in run_faults(Path(folder), arguments.kills, arguments.seed):
            print(line(record), flush=True)
            records.append(record)
    if arguments.output is not None:
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
