"""No kernel takes more instructions than instructions.json says: a slow-down, seen without a GPU."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from instructions import FIGURES, Instruction, main_loop, values_of

SLACK = 1.02  # what another order of the same instructions may cost
STORE = "python tests/ops/instructions.py --store"


@cache
def stored() -> dict[str, Any]:
    return json.loads(FIGURES.read_text())


@cache
def measured() -> dict[str, Any]:
    """In a process where Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("instructions.py")
    child = subprocess.run([sys.executable, script, "--json"], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def slower(now: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> list[str]:
    """What to say about each launch that became slower, is new, or is gone."""
    said = [f"{launch}: is launched no more" for launch in before.keys() - now.keys()]
    for launch, figures in now.items():
        if launch not in before:
            said.append(f"{launch}: no figure is stored, it takes {figures['by_value']} by value")
            continue
        old = before[launch]
        for key, what in (("by_value", "instructions by value"), ("loop", "instructions in the loop")):
            # Where the loop has more matrix instructions, its length is another loop's.
            if figures[key] > old[key] * SLACK and (key != "loop" or figures["matrix"] == old["matrix"]):
                said.append(f"{launch}: {figures[key]} {what}, {old[key]} were stored")
        if figures["stack"] > old["stack"]:
            said.append(f"{launch}: spills {figures['stack']} bytes of registers, {old['stack']} were stored")
        if figures["matrix"] < old["matrix"]:
            said.append(f"{launch}: {figures['matrix']} matrix instructions, {old['matrix']} were stored")
    return said


@pytest.mark.integration
def test_no_kernel_takes_more_instructions_than_it_did() -> None:
    now, before = measured(), stored()
    if now["triton"] != before["triton"]:
        pytest.skip(f"the figures are of Triton {before['triton']}, this is {now['triton']}: store some with {STORE}")
    said = slower(now["launches"], before["launches"])
    assert not said, "\n".join([*said, f"If that is meant, store it and say why in the commit: {STORE}"])


FAST = {"by_value": 10.0, "instructions": 400, "loop": 100, "matrix": 8, "registers": 40, "stack": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"by_value": 10.2, "registers": 200}, []),
        ({"by_value": 9.0, "loop": 80}, []),
        ({"by_value": 10.3}, ["x: 10.3 instructions by value, 10.0 were stored"]),
        ({"loop": 103}, ["x: 103 instructions in the loop, 100 were stored"]),
        ({"loop": 150, "matrix": 16}, []),
        ({"stack": 16}, ["x: spills 16 bytes of registers, 0 were stored"]),
        ({"matrix": 4}, ["x: 4 matrix instructions, 8 were stored"]),
    ],
)
def test_a_slow_down_is_said(change: dict[str, float], said: list[str]) -> None:
    assert slower({"x": FAST | change}, {"x": FAST}) == said


def test_launches_without_figures_and_figures_without_launches_are_said() -> None:
    assert slower({"x": FAST}, {}) == ["x: no figure is stored, it takes 10.0 by value"]
    assert slower({}, {"x": FAST}) == ["x: is launched no more"]


TTIR = """
tt.func public @_kernel(%x_ptr: !tt.ptr<bf16>, %codes_ptr: !tt.ptr<i8>) {
  %x = tt.load %px, %mask, %zero : tensor<16x128x!tt.ptr<bf16>>
  %again = tt.load %px, %mask, %zero : tensor<16x128x!tt.ptr<bf16>>
  %s = tt.load %ps : !tt.ptr<f32>
  %base = tt.splat %codes_ptr : !tt.ptr<i8> -> tensor<16x64x!tt.ptr<i8>>
  %left = tt.addptr %base, %offset : tensor<16x64x!tt.ptr<i8>>, tensor<16x64xi32>
  tt.store %left, %codes, %mask : tensor<16x64x!tt.ptr<i8>>
"""
SECOND = """
  %right = tt.addptr %left, %offset : tensor<16x64x!tt.ptr<i8>>, tensor<16x64xi32>
  tt.store %right, %codes, %mask : tensor<16x64x!tt.ptr<i8>>
"""


def test_values_are_those_that_are_stored_to_one_place_or_loaded_at_once() -> None:
    assert values_of(TTIR) == 16 * 128
    assert values_of(TTIR + SECOND) == 16 * 128
    assert values_of(TTIR + SECOND + SECOND) == 3 * 16 * 64
    assert values_of("%s = tt.load %ps : !tt.ptr<f32>") == 1


def test_the_main_loop_is_the_smallest_with_most_matrix_instructions() -> None:
    names = ["MOV", "LDS", "HGMMA", "IADD", "BRA", "HGMMA", "IADD", "BRA", "EXIT", "BRA"]
    jumps = {4: 0x10, 7: 0x00, 9: 0x90}  # an inner loop of four, an outer one of eight, and the end
    code = [
        Instruction(16 * i, name, f" 0x{16 * jumps[i] // 16:x}" if i in jumps else "") for i, name in enumerate(names)
    ]
    assert main_loop(code) == {"loop": 8, "matrix": 2}
    assert main_loop(code[:5]) == {"loop": 4, "matrix": 1}
    assert main_loop([Instruction(0, "MOV", "")]) == {"loop": 0, "matrix": 0}
