"""Times ops, optimizers or training steps beside others, or trains to compare: `python -m recipes.benchmark
benchmark=ops`, or `lq-benchmark`.

docs/benchmarks.md says what the columns mean.
"""

import json
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from lq_plugin.recipes.benchmarks.records import HEAD, circumstances, command_line, read_lines, replace_lines


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="benchmark")
def benchmark(config: DictConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    around = circumstances(device, command_line("recipes.benchmark"))
    print(", ".join(f"{key} {value or 'not there'}" for key, value in around.items()))
    if device.type == "cpu":
        print("No GPU: these are times of the PyTorch references, at sizes that say nothing about speed.")
    suite = instantiate(config.benchmark, _convert_="all")
    print(f"\n{getattr(suite, 'head', HEAD)}")
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A suite of long runs keeps what the file holds of them; the others begin anew.
    replace_lines(path, suite.continue_from(read_lines(path)) if hasattr(suite, "continue_from") else [])
    problems = []
    with path.open("a") as output:
        for result in suite.run(device):
            print(result.row(), flush=True)
            output.write(json.dumps(result.record() | around) + "\n")
            output.flush()
            problems += [result.op] if result.problem else []
    print(f"\nwritten to {path}")
    if problems:
        raise SystemExit(f"not timed, since they do not agree with their references or failed: {', '.join(problems)}")


def main() -> None:
    benchmark()


if __name__ == "__main__":
    main()
