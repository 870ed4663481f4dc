"""A case of a benchmark in a process of its own: its peak of memory is its own, and its end is nobody else's.

The process is `python -m MODULE ARGUMENT`, where the argument is JSON; the last line that it prints is JSON too.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LONGEST_PROBLEM = 300
_ERROR = re.compile(r"[A-Za-z_][\w.]*: ")  # the line of a traceback that names the exception


def run_process(
    module: str, asked: Mapping[str, Any], patience: float, environment: Mapping[str, str]
) -> tuple[dict[str, Any], str | None]:
    """What the process printed, and None; or whatever its end, nothing and the problem.

    patience: seconds until it is ended. environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", module, json.dumps(asked)]
    env = os.environ | environment
    try:
        child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return {}, f"not done after {patience:g} s"
    if child.returncode:
        return {}, f"exit code {child.returncode}: {_message(child.stderr)[:LONGEST_PROBLEM]}"
    return json.loads(child.stdout.strip().splitlines()[-1]), None


def _message(stderr: str) -> str:
    """The last exception that stderr names, after which torch.compile gives advice, or else its last line."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])
