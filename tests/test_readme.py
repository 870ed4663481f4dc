"""The README's blocks run as they stand; in shell blocks, what would take minutes or a network is rehearsed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "sh"]

# make only prints, pip only resolves what is here, and a recipe runs one batch of everything.
REHEARSAL = """
set -eu
make() { command make --dry-run "$@"; }
pip() { command python -m pip --quiet install --dry-run --no-deps --no-build-isolation . ; }
python() { case "$*" in *recipes.*) command python "$@" trainer.fast_dev_run=true ;; *) command python "$@" ;; esac; }
"""


def test_every_block_is_python_shell_or_output() -> None:
    assert PYTHON
    assert SHELL
    assert {language for language, _ in BLOCKS} <= {"python", "sh", "text"}


@pytest.mark.integration
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number: int, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(PYTHON[number])
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
@pytest.mark.parametrize("number", range(len(SHELL)))
def test_shell_block_runs(number: int) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    script = REHEARSAL + SHELL[number]
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
