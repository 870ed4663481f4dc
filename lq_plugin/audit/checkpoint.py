"""Files of torch.save: Lightning's checkpoints, state_dicts, states of optimizers. No object in them is unpickled."""

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lq_plugin import record
from lq_plugin.adapter_checkpoint import ENTRY, from_tensor
from lq_plugin.audit.facts import BROKEN, NOTE, STATE_DICT, UNKNOWN, Audit, few
from lq_plugin.audit.optimizer import add_optimizer, is_optimizer_state
from lq_plugin.audit.tensors import StoredTensors
from lq_plugin.checkpoint_io import AtomicCheckpointIO, DamagedCheckpointError, check

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"


def read_checkpoint(path: Path, audit: Audit) -> StoredTensors | None:
    """What it says of itself goes into `audit`; returns the tensors of its model, if it has one."""
    content = _content(path, audit)
    if content is None:
        return None
    if is_optimizer_state(content):
        audit.kind = "state of an optimizer"
        add_optimizer(audit, content)
        return None
    if not isinstance(content, Mapping):
        audit.add(UNKNOWN, f"it holds a {type(content).__name__}, expected a dict of tensors")
        return None
    if "state_dict" in content:
        return _lightning(content, audit)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        audit.add(UNKNOWN, f"it holds {few(list(map(str, content)))}, and no tensors by name")
        return None
    audit.kind = STATE_DICT
    audit.readers["torch.load(weights_only=True)"] = "yes"
    return StoredTensors.of_dict(tensors)


def _content(path: Path, audit: Audit) -> Any:
    with open(path, "rb") as file:
        head = file.read(4)
    if head != _ZIP:
        if not head:
            audit.add(BROKEN, "the file is empty")
        elif head.startswith(_PICKLE):
            audit.add(UNKNOWN, "it is a bare pickle (torch before 1.6, or another program's), and nothing is unpickled")
        else:
            audit.add(BROKEN, "its first bytes are no torch file's: it was cut or overwritten, or is something else")
        return None
    try:
        check(path)
        if not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
            audit.add(UNKNOWN, "it is a zip archive, and none that torch.save wrote")
            return None
        content = AtomicCheckpointIO().load_checkpoint(path)
    except DamagedCheckpointError as error:
        audit.add(BROKEN, str(error))
        return None
    except ValueError as error:
        audit.add(UNKNOWN, str(error).splitlines()[0])
        return None
    audit.facts["checksums"] = "CRC-32 of every record: right"
    return content


def _lightning(content: Mapping[str, Any], audit: Audit) -> StoredTensors | None:
    version = content.get("pytorch-lightning_version")
    audit.kind = "checkpoint of Lightning" if version else "checkpoint with a state_dict"
    written = [f"Lightning {version}"] if version else []
    for key, name in (("epoch", "epoch"), ("global_step", "step")):
        if key in content:
            written.append(f"{name} {content[key]:,}")
    audit.facts["written by"] = ", ".join(written) or "unknown"
    _record(content, audit)
    state_dict = content["state_dict"]
    if not isinstance(state_dict, Mapping):
        audit.add(BROKEN, f"its state_dict is a {type(state_dict).__name__}, expected tensors by name")
        return None
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    _fingerprints(tensors, audit)
    for number, optimizer in enumerate(content.get("optimizer_states", [])):
        if is_optimizer_state(optimizer):
            add_optimizer(audit, optimizer, f"optimizer {number}")
    audit.readers.setdefault("Lightning", "yes: Trainer.fit(ckpt_path=...)")
    return StoredTensors.of_dict(tensors)


def _record(content: Mapping[str, Any], audit: Audit) -> None:
    """What QuantPlugin wrote of the run's formats."""
    written = content.get(record.KEY)
    if written is None:
        audit.facts["low bits"] = "written without QuantPlugin"
        return
    if not isinstance(written, Mapping) or not isinstance(written.get("linear"), Mapping):
        audit.add(BROKEN, f"its record {record.KEY!r} is not what QuantPlugin writes")
        return
    if written.get("version") != record.VERSION:
        audit.add(UNKNOWN, f"its record has version {written.get('version')}, this version reads {record.VERSION}")
    formats = Counter(written["linear"].values())
    said = ", ".join(f"{name} in {count} layers" for name, count in formats.most_common()) or "no layer quantised"
    audit.facts["trained in"] = f"{said}; {written.get('precision')} elsewhere"
    audit.facts["random generators"] = "saved" if written.get("rng") else "not saved (several processes)"
    audit.readers["Lightning"] = "yes: with a QuantPlugin of the same formats; others are refused by name"


def _fingerprints(tensors: dict[str, Tensor], audit: Audit) -> None:
    """Takes the entries that stand for a frozen base out of the tensors."""
    for name in [name for name in tensors if name.rpartition(".")[2] == ENTRY]:
        try:
            base = from_tensor(tensors.pop(name))
        except ValueError as error:
            audit.add(BROKEN, str(error))
            continue
        audit.facts["frozen base"] = f"not in the file; the fingerprint of {len(base)} tensors is"
        audit.add(NOTE, "only what was trained is in it: load the base first, quantised as it was")
