"""linear="auto": which linears are quantised, and in which format, so that none is slower than in 16 bits.

A layer is quantised where forward and both gradients were measured to be at least 3 % faster on this device, at its
shape or the nearest smaller one, eager and compiled; and only in formats whose weight gradient stays in 16 bits, which
train as 16 bits do. Where nothing was measured a rule decides, and where it is not sure, 16 bits stay:

    device              table               without one
    CPU                                     int8_switchback at every size (the reference: for correctness)
    sm_80, 86, 89       a user's            int8_switchback from 2048 -> 8192 on
    sm_90               stored or a user's  int8_switchback from 2048 -> 8192 on
    sm_100 and newer    a user's            fp8_rowwise_with_gw_hp from 2048 -> 8192 on
    gfx942              a user's            int8_switchback from 2048 -> 8192 on
    others                                  an error that names what is missing

From 2048 -> 8192 on: both sides are at least 2048, and there are at least as many weights, so 4096 -> 4096 is in.

A table holds for as many tokens a step as it was measured with (8192) or more: when layers are converted nobody knows
how many a step will have, and with fewer 8 bits gain less, or lose.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lq_plugin.formats import TRAINABLE_FORMATS, GemmFormats
from lq_plugin.formats.devices import lacking
from lq_plugin.speed_table import MAKE, Row, SpeedTable, stored_tables

INT8, FP8 = "int8_switchback", "fp8_rowwise_with_gw_hp"

# SwitchBack with the kernels of bitsandbytes 0.49, forward and backward, 32768 tokens, on an H200: 0.4 % of the time
# saved at 1024 -> 4096, 10.8 % at 2048 -> 8192. A matrix unit that takes 8 bits at twice the rate of 16 has as much to
# gain there; smaller layers have shown nothing.
LEAST = (2048, 8192)

# What the fast kernels need: rows of operands that begin at multiples of 16 bytes. Others are right, but not measured.
ALIGNMENT = 16


@dataclass(frozen=True)
class Device:
    """name: as its driver gives it. architecture: sm_90, gfx942 or cpu."""

    name: str
    architecture: str

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """ValueError for a device that is neither a CPU nor a GPU of NVIDIA or AMD."""
        if device.type == "cpu":
            return cls(platform.machine(), "cpu")
        if device.type != "cuda":
            raise ValueError(
                f"linear='auto' knows CPUs and GPUs of NVIDIA and AMD, the model trains on {device}: name a format, or "
                "pass linear=None"
            )
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls(properties.name, properties.gcnArchName.partition(":")[0])
        return cls(properties.name, f"sm_{properties.major}{properties.minor}")

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture})"


def training_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device`, or where the model is; of a model that is on a CPU or nowhere yet, the GPU if there is one."""
    if device is not None:
        return torch.device(device)
    placed = (p.device for p in model.parameters() if p.device.type not in ("cpu", "meta"))
    return next(placed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Choice:
    """formats: None is 16 bits. reason: why, with the gain where one was measured."""

    formats: GemmFormats | None
    reason: str


@dataclass(frozen=True)
class Rule:
    """What is chosen where nothing was measured: a format, and the sides of the smallest layer that gets it."""

    format: str
    least: tuple[int, int]
    note: str = ""

    def __str__(self) -> str:
        return f"{self.format} from {self.least[0]} -> {self.least[1]} on"

    def takes(self, in_features: int, out_features: int) -> bool:
        return min(in_features, out_features) >= min(self.least) and in_features * out_features >= math.prod(self.least)


@dataclass(frozen=True)
class Auto:
    """A format for each layer by the device and the layer's shape; "auto" is Auto().

    table: a file that benchmark=policy wrote on this device; None is the one that ships with the package, where there
    is one, else a rule. least_gain: 0.03 is 3 % faster than 16 bits.

    FileNotFoundError and ValueError: a table that cannot be read (see SpeedTable.read). TypeError: other values.
    """

    table: str | Path | None = None
    least_gain: float = 0.03

    def __post_init__(self) -> None:
        gain = self.least_gain
        if isinstance(gain, bool) or not isinstance(gain, int | float) or not math.isfinite(gain) or gain < 0:
            raise ValueError(f"Auto(least_gain={gain!r}): expected a share that is 0 or more; 0.03 is 3 % faster")
        if self.table is not None and not isinstance(self.table, str | Path):
            raise TypeError(f"Auto(table={self.table!r}): expected the path of a speed table, or None; {MAKE}")
        if self.table is not None:
            SpeedTable.read(self.table)

    def on(self, device: Device) -> "Chooser":
        """RuntimeError: a device without 8-bit matrix units. ValueError: an unknown one; the table of another one."""
        rule = rule_for(device)
        if self.table is None:
            return Chooser(device, rule, self.least_gain, stored_table(device))
        table = SpeedTable.read(self.table)
        if (table.device, table.architecture) != (device.name, device.architecture):
            raise ValueError(
                f"{table.source} was measured on {table.device} ({table.architecture}), and the model trains on "
                f"{device}: {MAKE} there; without table= it is the stored one, or a rule"
            )
        return Chooser(device, rule, self.least_gain, table)


@dataclass(frozen=True)
class Chooser:
    """Auto on a device. A table of another device of the same architecture decides together with the rule."""

    device: Device
    rule: Rule
    least_gain: float
    table: SpeedTable | None

    def choose(self, in_features: int, out_features: int) -> Choice:
        shape = f"{in_features} -> {out_features}"
        if self.table is None and not any(self.rule.least):
            return Choice(TRAINABLE_FORMATS[self.rule.format], f"auto: {self.device.architecture}, every size")
        if in_features % ALIGNMENT or out_features % ALIGNMENT:
            return Choice(None, f"auto: {shape} are not multiples of {ALIGNMENT}")
        measured = self.table is not None and self.table.device == self.device.name
        if not measured and not self.rule.takes(in_features, out_features):
            return Choice(None, f"auto: {shape} is small, and not measured on this device")
        if self.table is None:
            return Choice(TRAINABLE_FORMATS[self.rule.format], "auto: by rule, not measured on this device")
        nearest = self.table.nearest(in_features, out_features)
        if nearest is None:
            return Choice(None, f"auto: {shape} is smaller than what was measured")
        return self._measured(*nearest)

    def _measured(self, shape: tuple[int, int], rows: Sequence[Row]) -> Choice:
        best = max(rows, key=lambda row: row.least)
        where, gain = f"at {shape[0]} -> {shape[1]}", best.least - 1
        if gain < 0:
            return Choice(None, f"auto: 16 bits are faster {where}")
        if best.least < 1 + self.least_gain:
            return Choice(None, f"auto: {gain:.2%} faster {where}, less than {self.least_gain:.2%}")
        return Choice(TRAINABLE_FORMATS[best.format], f"auto: {gain:.1%} faster {where}")

    @property
    def note(self) -> str:
        """What decided, in a sentence."""
        about = f"; {self.rule.note}" if self.rule.note else ""
        if self.table is None and not any(self.rule.least):
            return f"auto: {self.rule.format} at every size on a CPU, for correctness, not for speed{about}"
        if self.table is None:
            return f"auto: nothing was measured on {self.device}; {self.rule}{about}; {MAKE}"
        table = self.table
        versions = ", ".join(f"{package} {table.measured.get(package)}" for package in ("torch", "triton"))
        foreign = "" if table.device == self.device.name else f", and only {self.rule}; {MAKE} of {self.device.name}"
        return (
            f"auto: as measured on {table.device} ({', '.join(table.modes)}; {versions}), for {table.tokens} tokens a "
            f"step or more{foreign}{about}"
        )


def rule_for(device: Device) -> Rule:
    """RuntimeError: no 8-bit matrix units. ValueError: a GPU that nobody tried."""
    architecture = device.architecture
    if architecture == "cpu":
        return Rule(INT8, (0, 0))
    if architecture.startswith("gfx94"):
        return Rule(INT8, LEAST, "fp8 is another encoding on this GPU, so its formats are not considered")
    if not architecture.startswith("sm_"):
        raise ValueError(f"linear='auto' has no rule for {device}: name a format, or pass linear=None")
    rule = Rule(FP8 if int(architecture.removeprefix("sm_")) >= 100 else INT8, LEAST)
    missing = lacking(TRAINABLE_FORMATS[rule.format].element_types, architecture)
    if missing:
        raise RuntimeError(f"linear='auto' has no format for {device}: {missing}")
    return rule


def candidates(device: Device) -> tuple[str, ...]:
    """The formats that a table of this device is measured for, where no others are asked for."""
    return (INT8, FP8) if device.architecture in ("cpu", "sm_90") else (rule_for(device).format,)


def stored_table(device: Device) -> SpeedTable | None:
    """The table of this device that ships with the package, else one of its architecture, else None."""
    tables = [table for table in stored_tables() if table.architecture == device.architecture]
    return min(tables, key=lambda table: (table.device != device.name, table.device), default=None)
