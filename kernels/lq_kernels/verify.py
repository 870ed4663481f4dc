"""`python -m lq_kernels.verify`: every op on this machine's GPU against its PyTorch reference, as a table.

Made for bug reports: it takes about a minute, most of which is compilation, and names device, driver and versions. The
exit code is 0 where everything agrees and 1 where something does not. Without a GPU the references run, which shows
that the installation works; with --interpret kernels run too, in Triton's interpreter.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lq_kernels._triton import HAS_TRITON

if TYPE_CHECKING:
    from lq_kernels.verify_checks import Check

OK, FAILED, ERROR, UNSUPPORTED, RAN = "ok", "FAILED", "ERROR", "not on this GPU", "ran"
_CALLS = 10  # of which the median time is shown


@dataclass(frozen=True)
class Outcome:
    """difference, allowed: at the place that is worst. ms: of one call with its launch. first_s: with compilation."""

    op: str
    input: str
    shape: str
    dtype: str
    result: str
    difference: float | None = None
    allowed: float | None = None
    ms: float | None = None
    first_s: float | None = None
    problem: str = ""

    @property
    def is_fine(self) -> bool:
        return self.result not in (FAILED, ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; 2 for arguments that are not understood."""
    given = _parser().parse_args(arguments)
    if given.json and not given.json.absolute().parent.is_dir():
        print(f"there is no folder {given.json.absolute().parent} for --json {given.json}: name a file in one that is")
        return 2
    on_gpu = torch.cuda.is_available() and not given.interpret
    if (on_gpu or given.interpret) and not HAS_TRITON:
        print("Triton is not installed, so that there are no kernels to verify: pip install 'triton>=3.6'")
        return 2
    if given.interpret and not _is_interpreted():
        return _interpreted(sys.argv[1:] if arguments is None else arguments)
    mode = "gpu" if on_gpu else "interpreter" if given.interpret else "references"
    machine = describe_machine(on_gpu)
    print("\n".join(f"{name:8} {value}" for name, value in machine.items()))
    print(_WHAT_RUNS[mode] + "\n", flush=True)
    try:
        outcomes = list(_shown(verify(mode, given.op)))
    except ValueError as error:  # a name that no op has
        print(error)
        return 2
    print("\n" + _summary(outcomes, mode))
    if given.json:
        record = {"machine": machine, "mode": mode, "outcomes": [asdict(outcome) for outcome in outcomes]}
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(outcome.is_fine for outcome in outcomes) else 1


def verify(mode: str, ops: Sequence[str] = ()) -> Iterator[Outcome]:
    """mode: "gpu"; "interpreter", on the CPU, the inputs that it computes as GPUs do; "references", on the CPU."""
    from lq_kernels.verify_checks import checks

    device = torch.device("cuda" if mode == "gpu" else "cpu")
    inexact = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)  # the interpreter rounds to these as no GPU does
    for check in checks(ops):
        if mode == "interpreter" and check.uses(*inexact):
            continue
        outcome = _reference_only(check) if mode == "references" else _compared(check, device)
        yield outcome
        if outcome.result == ERROR and not _answers(device):
            yield Outcome("", "", "", "", ERROR, problem="the GPU does not answer any more; what follows was not run")
            return


def describe_machine(on_gpu: bool) -> dict[str, str]:
    """Device, driver and versions, as text."""
    device = platform.processor() or platform.machine()
    if on_gpu:
        facts = torch.cuda.get_device_properties(0)
        arch = getattr(facts, "gcnArchName", "") if torch.version.hip else f"sm_{facts.major}{facts.minor}"
        device = f"{facts.name}, {arch}, {facts.multi_processor_count} multiprocessors, {facts.total_memory >> 20} MiB"
    return {
        "device": device,
        "driver": _driver() if on_gpu else "none",
        "torch": f"{torch.__version__}, " + (f"HIP {torch.version.hip}" if torch.version.hip else _cuda()),
        "triton": _version("triton"),
        "lq": _version("lq-plugin"),
        "system": f"{platform.platform()}, Python {platform.python_version()}",
    }


def _compared(check: "Check", device: torch.device) -> Outcome:
    from lq_kernels.verify_checks import difference

    facts = (check.op, check.name, check.shape, check.dtype)
    run = check.kernel if device.type == "cpu" else check.dispatched
    try:
        expected = check.reference(*check.on(torch.device("cpu")))
        start = time.perf_counter()
        got = run(*check.on(device))
        _wait(device)
        first = time.perf_counter() - start
        limits = check.allowed(check.arguments, expected)
        pairs = [difference(*triple) for triple in zip(got, expected, limits, strict=True)]
        worst = max(pairs, key=lambda pair: (pair[0] - pair[1], pair[0]))
        ms = _median_ms(run, check.on(device), device)
    except Exception as error:  # whatever it is, the table says it and the other ops still run
        result = UNSUPPORTED if _has_no_fp8(error) else ERROR
        return Outcome(*facts, result, problem=f"{type(error).__name__}: {error}")
    return Outcome(*facts, FAILED if worst[0] > worst[1] else OK, *worst, ms, first)


def _reference_only(check: "Check") -> Outcome:
    arguments = check.on(torch.device("cpu"))
    facts = (check.op, check.name, check.shape, check.dtype)
    start = time.perf_counter()
    try:
        check.reference(*arguments)
    except Exception as error:
        return Outcome(*facts, ERROR, problem=f"{type(error).__name__}: {error}")
    return Outcome(*facts, RAN, ms=(time.perf_counter() - start) * 1e3)


def _median_ms(run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> float | None:
    if device.type == "cpu":  # the interpreter's time says nothing
        return None
    times = []
    for _ in range(_CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[_CALLS // 2]


def _has_no_fp8(error: Exception) -> bool:
    """Raised by `require_element_type`, before anything is launched."""
    return isinstance(error, RuntimeError) and "has no fp8" in str(error)


def _answers(device: torch.device) -> bool:
    try:
        _wait(device)
    except RuntimeError:
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _interpreted(arguments: Sequence[str]) -> int:
    """The exit code of another process: Triton decides when it is imported whether it interprets."""
    os.putenv("TRITON_INTERPRET", "1")
    quiet = ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]  # of the NaN that it computes as a GPU would
    return subprocess.run([sys.executable, *quiet, "-m", "lq_kernels.verify", *arguments], check=False).returncode


_WHAT_RUNS = {
    "gpu": "Every op on this GPU against its PyTorch reference on the CPU.",
    "interpreter": "Kernels in Triton's interpreter against their references; without bfloat16 and fp8, to which the "
    "interpreter\nrounds as no GPU does.",
    "references": "There is no GPU that torch can use here, so only the PyTorch references run: kernels are not "
    "verified.\n"
    "Pass --interpret to run some of them in Triton's interpreter.",
}
_WIDTHS = (31, 32, 10, 9)


def _shown(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Prints a line as each one comes: compilation takes its time, and a crash leaves what came before."""
    titles = zip(("op", "input", "shape", "dtype"), _WIDTHS, strict=True)
    print(" ".join(f"{title:{width}}" for title, width in titles) + f"{'worst':>10}{'allowed':>10}{'ms':>9}")
    for outcome in outcomes:
        names = zip((outcome.op, outcome.input, outcome.shape, outcome.dtype), _WIDTHS, strict=True)
        numbers = f"{_number(outcome.difference):>10}{_number(outcome.allowed):>10}{_milliseconds(outcome.ms):>9}"
        print(" ".join(f"{name:{width}}" for name, width in names) + f"{numbers}  {outcome.result}", flush=True)
        if outcome.problem and outcome.result == ERROR:
            print(f"    {outcome.problem}", flush=True)
        yield outcome


def _summary(outcomes: Sequence[Outcome], mode: str) -> str:
    counts = {result: sum(o.result == result for o in outcomes) for result in (OK, RAN, FAILED, ERROR, UNSUPPORTED)}
    said = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    ops = len({outcome.op for outcome in outcomes if outcome.op})
    said = f"{ops} op{'s' * (ops != 1)}, {said}"
    wrong = sorted({outcome.op for outcome in outcomes if not outcome.is_fine} - {""})
    if wrong:
        return f"{said}. Wrong: {', '.join(wrong)}. Please report the whole output."
    agree = "" if mode == "references" else " Kernels and references agree."
    return f"{said}.{agree}"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.2g}"


def _milliseconds(value: float | None) -> str:
    return f"{value:.3f}" if value else ""


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: nvidia-smi is not there"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip() or "unknown"


def _cuda() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lq_kernels.verify",
        description="Runs every op on this machine's GPU against its PyTorch reference and prints a table, for bug "
        "reports. Exit code 0: all agree; 1: something does not.",
    )
    parser.add_argument("op", nargs="*", help="names of ops; all by default")
    parser.add_argument("--interpret", action="store_true", help="on the CPU, in Triton's interpreter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
