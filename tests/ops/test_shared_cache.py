"""Processes that compile the same kernels into one empty cache at the same time get the same machine code."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.integration

COMPILES = """
import hashlib, json, sys, time
from pathlib import Path
import compile_only
from kernel_launches import LAUNCHES

names = ("rows of 1024", "columns of odd size", "blocks of 256")
compile_only.facts = lambda kernel, gpu: {"cubin": hashlib.sha256(kernel.asm["cubin"]).hexdigest()}
print("ready", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.0001)
print(json.dumps(compile_only.compile_all({name: LAUNCHES[name] for name in names}, compile_only.GPUS["sm_90"])))
"""


def compiling(folder: Path) -> subprocess.Popen[str]:
    """A process that compiles for a GPU that need not be there, as soon as folder/go exists."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parent)}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", COMPILES, str(folder / "go")]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def machine_code(process: subprocess.Popen[str]) -> dict[str, str]:
    """Kernel -> hash of its machine code."""
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    records = json.loads(output.splitlines()[-1])
    assert [record["error"] for record in records] == [None] * len(records)
    return {record["launch"] + record["kernel"]: record["cubin"] for record in records}


def test_two_processes_compile_into_one_empty_cache(tmp_path: Path) -> None:
    processes = [compiling(tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    (tmp_path / "go").touch()
    first, second = (machine_code(process) for process in processes)
    assert len(first) >= 3
    assert first == second
    cubins = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.cubin")}
    assert len(cubins) == len(first)
    began = time.time()
    assert machine_code(compiling(tmp_path)) == first  # a third one reads what they wrote
    assert all(path.stat().st_mtime < began and path.read_bytes() == cubin for path, cubin in cubins.items())
