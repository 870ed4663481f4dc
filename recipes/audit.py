"""What is in a model or checkpoint, is it whole, who would load it: `lq-audit <folder or file> [--reference <model>]`.

It takes lightning checkpoints, state_dicts and optimizer states of torch.save, folders of transformers and of
bitsandbytes, LoRA adapters and the cache of load_pretrained. It writes nothing and unpickles nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console


def audit(arguments: Sequence[str] | None = None) -> int:
    """The exit code. 0: whole, 1: broken, 2: not understood."""
    given = _parser().parse_args(arguments)
    from lq_plugin.audit import audit_path
    from lq_plugin.audit.table import show

    found = audit_path(given.path, given.reference)
    show(found, Console())
    return found.exit_code


def main() -> None:
    sys.exit(audit())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lq-audit",
        description="Tells what is in a model or a checkpoint: formats, blocks, codes and sizes, whether it is whole, "
        "and whether transformers, bitsandbytes and PEFT would load it. Nothing is unpickled.",
        epilog="Exit code 0: whole; 1: broken; 2: not understood.",
    )
    parser.add_argument("path", metavar="MODEL_OR_CHECKPOINT", help="a folder, a .safetensors file, a .ckpt or .pt")
    parser.add_argument("--reference", metavar="MODEL", help="the same model unquantised: adds the SQNR of each format")
    return parser


if __name__ == "__main__":
    main()
