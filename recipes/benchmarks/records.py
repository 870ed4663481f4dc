"""What a benchmark writes: a line of JSON for each case, complete in itself, and a line of a table for people."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PEERS = ("bitsandbytes", "torchao")
MORE = ("host_ms", "graph_ms", "graph_host_ms")  # of an optimizer: until step() returns, by replay, until that returns


@dataclass(frozen=True)
class Result:
    """One case: milliseconds of ours and of others, and what the device had to do at least.

    `bytes` are read or written once each, `operations` those of a matrix product; a `problem` is why there is no time.
    """

    name: str
    op: str
    shape: str
    dtype: str
    bytes: int
    operations: int = 0
    ms: float | None = None
    spread: float | None = None
    floor_ms: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    peer_problems: dict[str, str] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    def record(self) -> dict[str, Any]:
        """The keys that docs/benchmarks.md explains."""
        ms = self.ms
        amount, unit = (self.operations, "operations/s") if self.operations else (self.bytes, "bytes/s")
        return {
            "name": self.name,
            "op": self.op,
            "shape": self.shape,
            "dtype": self.dtype,
            "ms": _rounded(ms),
            "spread": _rounded(self.spread),
            "bytes": self.bytes,
            "ops": self.operations,
            "rate": _rounded(amount / ms * 1e3) if ms else None,
            "unit": unit,
            "share_of_floor": _rounded(self.floor_ms / ms) if ms and self.floor_ms else None,
            **{key: _rounded(value) for key, value in self.more.items()},
            "peers": {peer: _rounded(value) for peer, value in self.peers.items()},
            "ratio": {peer: _rounded(value / ms) for peer, value in self.peers.items()} if ms else {},
            "peer_problems": self.peer_problems,
            "problem": self.problem,
        }

    def row(self) -> str:
        return row(self.record())


def _rounded(value: float | None) -> float | None:
    """To four digits: more are noise."""
    return None if value is None else float(f"{value:.4g}")


HEAD = f"{'case':5} {'op':44} {'shape':24} {'dtype':14} {'ms':>9} {'spread':>7} {'rate':>11} {'of floor':>8}  peers"


def row(record: dict[str, Any]) -> str:
    """A line under HEAD; a ratio is how many times longer a peer takes."""
    head = f"{record['name']:5} {record['op']:44} {record['shape']:24} {record['dtype']:14}"
    if record["ms"] is None:
        return f"{head} {record['problem']}"
    tera = f"{record['rate'] / 1e12:.3f} {'TB/s' if record['unit'] == 'bytes/s' else 'TOPS'}"
    share = "" if record["share_of_floor"] is None else f"{record['share_of_floor']:.0%}"
    peers = [f"{peer} {ms:g} ({record['ratio'][peer]:.2f}x)" for peer, ms in record["peers"].items()]
    more = [f"{key.removesuffix('_ms')} {record[key]:g}" for key in MORE if key in record]
    problems = [f"{peer}: {problem[:60]}" for peer, problem in record["peer_problems"].items()]
    tail = ", ".join([*peers, *more, *problems])
    return f"{head} {record['ms']:9.4f} {record['spread']:7.1%} {tera:>11} {share:>8}  {tail}"


def circumstances(device: torch.device, command: str) -> dict[str, Any]:
    """Hardware, versions, command, commit and date: a part of every line, so that none is ever without them."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "triton", *PEERS)},
        "command": command,
        "commit": _said_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file. A last line that was cut off is left out."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def replace_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A file of these records in place of the one that is there; whenever it ends, one of the two is whole."""
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(json.dumps(record) + "\n" for record in records))
    new.replace(path)


def command_line(module: str) -> str:
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def installed(package: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    """The first line that a program prints, None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    child = subprocess.run(command, capture_output=True, text=True)
    return child.stdout.strip().partition("\n")[0] or None


def _processor() -> str:
    cpu_info = Path("/proc/cpuinfo")  # Linux; elsewhere the name of the architecture has to do
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
