"""Machine instructions of every kernel on a Hopper GPU, by value: what a kernel costs where memory does not hold it up.

    python tests/ops/instructions.py            # prints the figures of all launches in kernel_launches.py
    python tests/ops/instructions.py --store    # and writes them to instructions.json, which test_instructions.py holds

A program of `warps` warps works on a tile, and each instruction of a warp serves 32 lanes:

    by_value = instructions * 32 * warps / values that the code stores to one place, or loads at once if that is more

counted in the whole machine code, without the padding behind its end. In both counts a loop that was not unrolled is
there once, and a branch with both its sides. Where the code has a loop with matrix instructions, `loop` is the number
of all instructions in it and `matrix` of those.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compile_only
import triton
from compile_only import GPUS, Gpu, compile_all
from kernel_launches import LAUNCHES

GPU = "sm_90"
FIGURES = Path(__file__).with_name("instructions.json")
KEYS = ("by_value", "instructions", "loop", "matrix", "registers", "stack")

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w+)([^;]*);", re.MULTILINE)
_MATRIX = re.compile(r"[HIQ]GMMA|[HI]MMA|UTC\w*MMA")
_ACCESS = re.compile(r"\btt\.(load|store|descriptor_load|descriptor_store) (%[\w#]+)([^\n]*)")
_TENSOR = re.compile(r"tensor<((?:\d+x)+)")
_DEFINITION = re.compile(r"^\s*(%[\w#]+) = (tt\.\w+) (%[\w#]+)", re.MULTILINE)
_POINTERS = {"tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.bitcast"}  # lead to a pointer


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    def jumps_back_to(self) -> int | None:
        """Where a loop begins that this instruction ends; the endless jump to itself behind the code is none."""
        target = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        begin = int(target[1], 16) if target else self.address
        return begin if begin < self.address else None


def facts(kernel: Any, gpu: Gpu) -> dict[str, Any]:
    """The figures of a compiled kernel, in the place of compile_only's."""
    dump = disassembly(kernel.asm["cubin"])
    code = [
        Instruction(int(address, 16), name, operands)
        for address, name, operands in _INSTRUCTION.findall(dump)
        if name != "NOP"
    ]
    lanes = gpu.target.warp_size * kernel.metadata.num_warps
    registers, stack = (int(number) for number in re.findall(r" REG:(\d+) STACK:(\d+) ", dump)[0])
    return {
        "by_value": round(len(code) * lanes / values_of(kernel.asm["ttir"]), 2),
        "instructions": len(code),
        **main_loop(code),
        "registers": registers,
        "stack": stack,
    }


def disassembly(cubin: bytes) -> str:
    """Resource usage and machine code, by the tool that Triton's wheel ships, in one call: it takes a while."""
    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def values_of(ttir: str) -> int:
    """Values that the code stores to one place, or loads at once if that is more; 1 for a kernel of scalars."""
    made_from = {name: source for name, operation, source in _DEFINITION.findall(ttir) if operation in _POINTERS}
    stored: dict[str, int] = {}
    most = 1
    for operation, pointer, types in _ACCESS.findall(ttir):
        shapes = [[int(side) for side in shape.split("x")[:-1]] for shape in _TENSOR.findall(types)]
        size = max(map(math.prod, shapes), default=1)
        while pointer in made_from:
            pointer = made_from[pointer]
        stored[pointer] = stored.get(pointer, 0) + size * operation.endswith("store")
        most = max(most, size, stored[pointer])
    return most


def main_loop(code: list[Instruction]) -> dict[str, int]:
    """Instructions, and matrix instructions, of the smallest loop that has the most of the latter."""
    loops = [
        [one for one in code if begin <= one.address <= end.address]
        for end in code
        if (begin := end.jumps_back_to()) is not None
    ]
    counts = [(sum(bool(_MATRIX.match(one.name)) for one in loop), -len(loop)) for loop in loops]
    matrix, length = max(counts, default=(0, 0))
    return {"loop": -length, "matrix": matrix} if matrix else {"loop": 0, "matrix": 0}


def measured() -> dict[str, Any]:
    """{"triton": version, "launches": {"launch / kernel": figures}}; numbered where a launch starts a kernel again."""
    compile_only.facts = facts
    launches: dict[str, dict[str, float]] = {}
    for record in compile_all(LAUNCHES, GPUS[GPU]):
        if not record["error"]:  # test_compiles.py says so
            names = (
                f"{record['launch']} / {record['kernel']}{number}" for number in ("", *(f" {n}" for n in range(2, 9)))
            )
            name = next(name for name in names if name not in launches)
            launches[name] = {key: record[key] for key in KEYS}
    return {"triton": triton.__version__, "launches": launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help=f"write {FIGURES.name}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    figures = measured()
    if arguments.store:
        lines = (f"    {json.dumps(name)}: {json.dumps(figures['launches'][name])}" for name in figures["launches"])
        head = f'{{\n  "triton": "{figures["triton"]}",\n  "launches": {{\n'
        FIGURES.write_text(head + ",\n".join(lines) + "\n  }\n}\n")
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{'launch / kernel':64}" + "".join(f"{key:>13}" for key in KEYS))
    for name, of_launch in figures["launches"].items():
        print(f"{name:64}" + "".join(f"{of_launch[key]:>13}" for key in KEYS))


if __name__ == "__main__":
    main()
