"""What is in a model or a checkpoint on disk, whether it is whole, and who would load it. Nothing is unpickled."""

from contextlib import ExitStack
from pathlib import Path

from lq_plugin.audit.checkpoint import SUFFIXES, read_checkpoint
from lq_plugin.audit.facts import BROKEN, TENSOR_FILE, UNKNOWN, Audit, Finding, Row
from lq_plugin.audit.folder import check_config, open_files, read_folder
from lq_plugin.audit.readers import add_readers
from lq_plugin.audit.tensors import StoredTensors, add_rows, compare, weights

__all__ = ["Audit", "Finding", "Row", "audit_path"]

_WEIGHTS = "weights"


def audit_path(path: str | Path, reference: str | Path | None = None) -> Audit:
    """path: a folder of transformers, of PEFT or of the cache, a .safetensors file, or a file of torch.save.

    reference: the same model in any of these; weights are compared with it, read back where they are quantised. All
    values are read once, one tensor at a time. What is wrong is in `findings`; nothing is raised for it.
    """
    path = Path(path).expanduser()
    audit = Audit(str(path))
    with ExitStack() as stack:
        try:
            _audit(path, reference, audit, stack)
        except ValueError as error:  # a file that changed, or was damaged behind its header
            audit.add(BROKEN, str(error))
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # of what somebody else wrote
            audit.add(BROKEN, f"its contents are not of the form that its kind has ({type(error).__name__}: {error})")
        except OSError as error:
            audit.add(UNKNOWN, f"it cannot be read: {error}")
    return audit


def _audit(path: Path, reference: str | Path | None, audit: Audit, stack: ExitStack) -> None:
    stored = _open(path, audit, stack)
    if stored is None:
        if reference is not None and not audit.findings:
            audit.add(UNKNOWN, "it has no weights that could be compared with a reference")
        return
    found = weights(stored, audit)
    add_rows(audit, _WEIGHTS, stored, found)
    if audit.kind == "transformers model":
        check_config(path, found, audit)
        add_readers(path, found, audit)
    if reference is not None:
        other = Audit(str(reference))
        theirs = _open(Path(reference).expanduser(), other, stack)
        if theirs is None:
            reasons = "; ".join(finding.text for finding in other.findings) or "it has no weights"
            audit.add(UNKNOWN, f"the reference {reference} cannot be read: {reasons}")
        else:
            compare(audit, _WEIGHTS, found, weights(theirs, other))
            audit.facts["reference"] = f"{reference}, {other.kind}"


def _open(path: Path, audit: Audit, stack: ExitStack) -> StoredTensors | None:
    if path.is_dir():
        return read_folder(path, audit, stack)
    if not path.exists():
        audit.add(UNKNOWN, f"there is no file or folder {path}")
        return None
    if path.suffix == ".safetensors":
        audit.kind = TENSOR_FILE
        return open_files(path, audit, stack)
    if path.suffix not in SUFFIXES:
        audit.add(UNKNOWN, f"expected a folder, a .safetensors file or one of {', '.join(SUFFIXES)}, got {path.name}")
        return None
    return read_checkpoint(path, audit)
