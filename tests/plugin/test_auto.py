"""linear="auto": what it chooses by device, shape and table, and what it says."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lq_plugin
from lq_plugin import Auto, QuantPlugin, speed_table
from lq_plugin.auto_format import Chooser, Device, candidates, stored_table, training_device
from lq_plugin.conversion import Conversion, Layer, frozen_plan, report_of
from lq_plugin.formats import TRAINABLE_FORMATS
from lq_plugin.layers import QuantLinear, SwitchBackLinearVectorwise
from lq_plugin.policy import Policy
from lq_plugin.report import conversion_table
from lq_plugin.speed_table import Row, SpeedTable, digest, keeps_weight_gradient, stored_tables

INT8, FP8 = "int8_switchback", "fp8_rowwise_with_gw_hp"
CPU = Device(platform.machine(), "cpu")
H200, H100 = Device("NVIDIA H200", "sm_90"), Device("NVIDIA H100 PCIe", "sm_90")

Speedups = Mapping[tuple[int, int], Mapping[str, tuple[float, float]]]


def table(speedups: Speedups, device: Device = H200) -> SpeedTable:
    """{(in_features, out_features): {format: (eager, compiled)}} as a table of a device."""
    rows = tuple(
        Row(shape, name, {"eager": eager, "compiled": compiled})
        for shape, by_format in speedups.items()
        for name, (eager, compiled) in by_format.items()
    )
    measured = {"torch": "2.11.0", "triton": "3.6.0"}
    return SpeedTable(device.name, device.architecture, 8192, ("eager", "compiled"), measured, rows)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """stored(table): the only ones that the package has."""
    folder = tmp_path / "tables"
    monkeypatch.setattr(speed_table, "FOLDER", folder)

    def store(*tables: SpeedTable) -> None:
        for number, one in enumerate(tables):
            one.write(folder / f"{number}.json")

    return store


@pytest.fixture
def written(tmp_path: Path):
    """written(speedups) -> the path of a table of this machine's CPU, or of another device."""

    def write(speedups: Speedups, device: Device = CPU) -> Path:
        path = tmp_path / f"table_{len(list(tmp_path.iterdir()))}.json"
        table(speedups, device).write(path)
        return path

    return write


def chosen(device: Device, *shape: int, auto: Auto | None = None) -> str | None:
    formats = (auto or Auto()).on(device).choose(*shape).formats
    return None if formats is None else formats.name


@pytest.mark.parametrize(
    ("architecture", "format"),
    [
        ("sm_80", INT8),
        ("sm_86", INT8),
        ("sm_87", INT8),
        ("sm_89", INT8),
        ("sm_90", INT8),
        ("gfx942", INT8),
        ("sm_100", FP8),
        ("sm_103", FP8),
        ("sm_120", FP8),
    ],
)
def test_without_a_table_a_rule_decides_by_architecture_and_size(architecture: str, format: str, stored) -> None:
    device = Device("some GPU", architecture)
    for shape in ((2048, 8192), (8192, 2048), (4096, 4096), (2064, 14336)):
        assert chosen(device, *shape) == format
    for shape in ((2032, 65536), (65536, 1024), (2048, 8176), (4080, 4096), (4097, 4096), (8192, 8193), (8200, 8192)):
        assert chosen(device, *shape) is None
    choice = Auto().on(device).choose(8192, 1024)
    assert choice.reason == "auto: 8192 -> 1024 is small, and not measured on this device"
    note = Auto().on(device).note
    assert f"nothing was measured on some GPU ({architecture}); {format} from 2048 -> 8192 on" in note
    assert ("another encoding" in note) == (architecture == "gfx942")


@pytest.mark.parametrize("shape", [(1, 1), (16, 37), (4096, 4096)])
def test_a_cpu_takes_every_size(shape: tuple[int, int], stored) -> None:
    assert chosen(CPU, *shape) == INT8


@pytest.mark.parametrize("architecture", ["sm_60", "sm_75"])
def test_a_gpu_without_8_bit_training_is_an_error_that_names_what_is_missing(architecture: str) -> None:
    with pytest.raises(RuntimeError, match=rf"no format for old \({architecture}\): .* sm_80 .*use linear=None"):
        Auto().on(Device("old", architecture))


@pytest.mark.parametrize("architecture", ["gfx90a", "gfx1100", ""])
def test_a_gpu_that_nobody_tried_is_an_error(architecture: str) -> None:
    with pytest.raises(ValueError, match=r"no rule for AMD .*: name a format, or pass linear=None"):
        Auto().on(Device("AMD", architecture))


def test_a_device_is_known_by_name_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Device.of(torch.device("cpu")) == CPU
    with pytest.raises(ValueError, match="knows CPUs and GPUs of NVIDIA and AMD, the model trains on mps"):
        Device.of(torch.device("mps"))
    properties = SimpleNamespace(name="X", major=10, minor=3, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    assert Device.of(torch.device("cuda:1")) == Device("X", "sm_103")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert Device.of(torch.device("cuda")) == Device("X", "gfx942")


def test_the_device_is_where_the_model_will_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    assert training_device(model, "cuda:1") == torch.device("cuda:1")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        expected = torch.device("cuda" if there else "cpu")
        assert training_device(model, None) == training_device(nn.Linear(2, 2, device="meta"), None) == expected
    assert training_device(model, "cpu") == torch.device("cpu")


MEASURED: Speedups = {
    (512, 512): {INT8: (0.7, 1.1), FP8: (0.8, 0.9)},
    (1024, 1024): {INT8: (1.02, 1.2), FP8: (1.0, 1.01)},
    (2048, 2048): {INT8: (1.1, 1.2), FP8: (1.3, 1.05)},
    (2048, 8192): {INT8: (1.2, 1.15), FP8: (1.16, 1.3)},
    (4096, 4096): {INT8: (1.25, 1.3), FP8: (1.4, 1.35)},
}


@pytest.mark.parametrize(
    ("shape", "format", "reason"),
    [
        ((256, 4096), None, "auto: 256 -> 4096 is smaller than what was measured"),
        ((4096, 496), None, "auto: 4096 -> 496 is smaller than what was measured"),
        ((512, 512), None, "auto: 16 bits are faster at 512 -> 512"),
        ((1008, 8192), None, "auto: 16 bits are faster at 512 -> 512"),
        ((1024, 1024), None, "auto: 2.00% faster at 1024 -> 1024, less than 3.00%"),
        ((2048, 2048), INT8, "auto: 10.0% faster at 2048 -> 2048"),
        ((2048, 8192), FP8, "auto: 16.0% faster at 2048 -> 8192"),
        ((3072, 14336), FP8, "auto: 16.0% faster at 2048 -> 8192"),
        ((8192, 2048), INT8, "auto: 10.0% faster at 2048 -> 2048"),
        ((14336, 4096), FP8, "auto: 35.0% faster at 4096 -> 4096"),
        ((4096, 11008), FP8, "auto: 16.0% faster at 2048 -> 8192"),  # as large as 4096 -> 4096, which gains more
        ((4096, 4104), None, "auto: 4096 -> 4104 are not multiples of 16"),
        ((4104, 4096), None, "auto: 4104 -> 4096 are not multiples of 16"),
    ],
)
def test_a_table_decides_by_the_nearest_shape_that_is_not_larger(
    shape: tuple[int, int], format: str | None, reason: str, stored
) -> None:
    stored(table(MEASURED))
    choice = Auto().on(H200).choose(*shape)
    assert (None if choice.formats is None else choice.formats.name, choice.reason) == (format, reason)


def test_the_nearest_shape_is_the_one_with_the_most_weights(stored) -> None:
    stored(table({(512, 8192): {INT8: (1.0, 1.0)}, (4096, 4096): {INT8: (1.5, 1.5)}}))
    assert chosen(H200, 4096, 8192) == INT8
    assert chosen(H200, 4080, 8192) is None


def test_the_gain_is_that_of_the_slower_mode_and_has_to_be_three_percent(stored) -> None:
    stored(table({(64, 64): {INT8: (1.03, 9.0)}, (128, 128): {INT8: (9.0, 1.0299)}}))
    assert chosen(H200, 64, 64) == INT8
    assert chosen(H200, 128, 128) is None
    assert chosen(H200, 128, 128, auto=Auto(least_gain=0.02)) == INT8
    assert chosen(H200, 64, 64, auto=Auto(least_gain=0.5)) is None


def test_a_device_of_the_same_architecture_takes_a_stored_table_where_the_rule_agrees(stored) -> None:
    stored(table({(64, 64): {INT8: (2.0, 2.0)}, (4096, 8192): {FP8: (1.0, 1.0)}}))
    assert chosen(H200, 1024, 1024) == INT8
    assert chosen(H100, 1024, 1024) is None
    assert chosen(H100, 4096, 4096) == INT8
    assert chosen(H100, 4096, 8192) is None
    note = Auto().on(H100).note
    assert "as measured on NVIDIA H200 (eager, compiled; torch 2.11.0, triton 3.6.0), for 8192 tokens" in note
    assert "only int8_switchback from 2048 -> 8192 on" in note
    assert "benchmark=policy" in note
    assert "benchmark=policy" not in Auto().on(H200).note


def test_of_stored_tables_that_of_the_device_goes_first(stored) -> None:
    stored(table({(64, 64): {FP8: (2.0, 2.0)}}, H200), table({(64, 64): {INT8: (2.0, 2.0)}}, H100))
    assert (chosen(H200, 64, 64), chosen(H100, 64, 64)) == (FP8, INT8)
    assert stored_table(Device("NVIDIA A100", "sm_80")) is None


def test_the_tables_of_the_package_can_be_read() -> None:
    names = [one.device for one in stored_tables()]
    assert len(names) == len(set(names)) == len(list(speed_table.FOLDER.glob("*.json")))
    assert (speed_table.FOLDER / "README.md").is_file()


def test_only_formats_with_a_16_bit_weight_gradient_are_chosen() -> None:
    kept = {name for name, formats in TRAINABLE_FORMATS.items() if keeps_weight_gradient(formats)}
    assert {INT8, FP8, "int8_switchback_vectorwise"} <= kept
    quantised = {"int8_rowwise", "fp8_tensorwise", "fp8_rowwise", "int8_switchback_mem_efficient", "sim_fp8_global"}
    assert not kept & quantised
    expected = {"cpu": {INT8, FP8}, "sm_80": {INT8}, "sm_90": {INT8, FP8}, "sm_103": {FP8}, "gfx942": {INT8}}
    assert {known: set(candidates(Device("any", known))) for known in expected} == expected


def test_a_table_of_the_users_decides_on_its_device_only(written) -> None:
    path = written({(16, 16): {INT8: (1.5, 1.5)}, (32, 32): {INT8: (1.0, 1.0)}})
    assert chosen(CPU, 16, 64, auto=Auto(path)) == INT8
    assert chosen(CPU, 32, 64, auto=Auto(str(path))) is None
    with pytest.raises(ValueError, match=rf"was measured on {CPU.name} \(cpu\), .* trains on NVIDIA H200 \(sm_90\)"):
        Auto(path).on(H200)


def test_a_table_reads_as_it_was_written(tmp_path: Path) -> None:
    before = table(MEASURED)
    before.write(tmp_path / "new" / "table.json")
    assert SpeedTable.read(tmp_path / "new" / "table.json") == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]
    assert SpeedTable.of(dict(reversed(before.content().items())), "the other way round") == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"kind": "shopping list"}, "is not a speed table: expected an object of kind"),
    "a later version": ({"version": 2}, "is a speed table of version 2, this lq_plugin reads version 1"),
    "no device": ({"device": ""}, "does not name its device"),
    "no tokens": ({"tokens": 0}, "has tokens=0, expected a positive whole number"),
    "no rows": ({"rows": []}, "has no rows, or two of the same shape and format"),
    "unknown modes": ({"modes": ["slow"]}, r"has the modes \['slow'\], expected one or both"),
    "rows that are numbers": ({"rows": [3]}, "lacks a part of a speed table"),
    "a part missing": ({"measured": None}, "lacks a part of a speed table"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_says_something_impossible_is_refused(case: str, tmp_path: Path) -> None:
    change, message = BAD[case]
    content = table(MEASURED).content() | change
    del content["digest"]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content | {"digest": digest(content)}))
    with pytest.raises(ValueError, match=f"table.json {message}"):
        Auto(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"format": "fp8_tensorwise"}, "'fp8_tensorwise'; 'auto' chooses among those whose weight gradient"),
        ({"format": "int7"}, "has the format 'int7'"),
        ({"speedup": {"eager": -1.0, "compiled": 1.0}}, "sizes or speed-ups that cannot be"),
        ({"speedup": {"eager": float("nan"), "compiled": 1.0}}, "sizes or speed-ups that cannot be"),
        ({"speedup": {"eager": float("inf"), "compiled": 1.0}}, "sizes or speed-ups that cannot be"),
        ({"speedup": {"eager": "1.2", "compiled": 1.0}}, "sizes or speed-ups that cannot be"),
        ({"speedup": {"eager": 1.2}}, "sizes or speed-ups that cannot be"),
        ({"in_features": 512.0}, "sizes or speed-ups that cannot be"),
        ({"out_features": 0}, "sizes or speed-ups that cannot be"),
        ({"in_features": 512, "out_features": 512, "format": FP8}, "two of the same shape and format"),
    ],
)
def test_a_row_that_says_something_impossible_is_refused(row: dict[str, Any], message: str) -> None:
    content = table(MEASURED).content()
    del content["digest"]
    content["rows"] = [content["rows"][0] | row, *content["rows"][1:]]
    with pytest.raises(ValueError, match=message):
        SpeedTable.of(content | {"digest": digest(content)}, "it")


def test_a_table_that_was_changed_is_an_error_that_names_both_digests(written) -> None:
    path = written(MEASURED)
    said = json.loads(path.read_text())["digest"]
    path.write_text(path.read_text().replace("0.7", "1.7", 1))
    with pytest.raises(ValueError, match=rf"was changed since it was written: .*'{said}', and that is '[0-9a-f]+'"):
        Auto(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\u0000", "null"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table.json is not a speed table.*benchmark=policy"):
        Auto(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"table": "absent.json"}, FileNotFoundError, "no speed table at 'absent.json'; .*benchmark=policy"),
        ({"table": "."}, FileNotFoundError, "no speed table at '.'"),
        ({"table": 3}, TypeError, r"Auto\(table=3\): expected the path"),
        ({"least_gain": -0.1}, ValueError, r"least_gain=-0.1\): expected a share"),
        ({"least_gain": "3%"}, ValueError, "expected a share"),
        ({"least_gain": float("inf")}, ValueError, "expected a share"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Auto(**arguments)


class Net(LightningModule):
    """A layer of 32 -> 64 and one of 64 -> 32."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 32)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](torch.relu(self.blocks[0](x)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


WIDE_IS_FASTER: Speedups = {(32, 32): {INT8: (0.5, 0.9)}, (32, 64): {INT8: (1.5, 1.2)}}
NONE_IS_FASTER: Speedups = {(16, 16): {INT8: (0.5, 0.5)}}


def formats_of(conversion: lq_plugin.Conversion) -> dict[str, str | None]:
    return {layer.name: layer.formats.name if layer.formats else None for layer in conversion.layers}


def test_the_table_says_what_was_chosen_with_the_gain_and_the_reason(written) -> None:
    path = written(WIDE_IS_FASTER)
    conversion = lq_plugin.convert(Net(), Auto(path))
    lines = str(conversion).splitlines()
    (wide,) = (line for line in lines if "64×32" in line)
    (narrow,) = (line for line in lines if "32×64" in line)
    assert "  int8_switchback (auto: 20.0% faster at 32 -> 64)  " in wide
    assert "  auto: 16 bits are faster at 32 -> 32  " in narrow
    note, share = lines[-2:]
    assert note.startswith(f"auto: as measured on {CPU.name} (eager, compiled; torch 2.11.0, triton 3.6.0), for 8192")
    assert share.startswith("int8_switchback: 50.0% of the weights")


def test_a_long_name_does_not_cut_the_reason(stored) -> None:
    stored(table({(14336, 4096): {FP8: (1.183, 1.183)}}))
    chooser = Auto().on(H200)
    linear = nn.Linear(14336, 4096, bias=False, device="meta")
    choice = chooser.choose(linear.in_features, linear.out_features)
    name = "language_model.model.layers.31.feed_forward.experts.shared.down_proj"
    layer = Layer(name, linear, choice.formats, choice.reason)
    text = conversion_table(Conversion([layer], [], set(), notes=(chooser.note,)), {})
    assert "fp8_rowwise_with_gw_hp (auto: 18.3% faster at 14336 -> 4096)" in text
    assert "…" not in text


def test_auto_by_name_takes_every_linear_on_a_cpu(stored) -> None:
    model = Net()
    conversion = lq_plugin.convert(model, "auto", device="cpu")
    assert formats_of(conversion) == {"blocks.0": INT8, "blocks.1": INT8}
    assert all(isinstance(block, QuantLinear) for block in model.blocks)
    assert "for correctness, not for speed" in str(conversion)


def test_the_chosen_device_is_that_of_the_call(written, stored, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def of(device: torch.device) -> Device:
        asked.append(device)
        return H200

    monkeypatch.setattr(Device, "of", of)
    assert set(formats_of(lq_plugin.convert(Net(), "auto", device="cuda:3")).values()) == {None}
    assert asked == [torch.device("cuda:3")]
    lq_plugin.convert(Net(), "int8_switchback")
    assert len(asked) == 1


def test_in_a_dict_auto_is_a_format_like_others(written) -> None:
    auto = Auto(written(WIDE_IS_FASTER))
    conversion = lq_plugin.convert(Net(), {"blocks.1": "int8_switchback_vectorwise", "*": auto})
    assert formats_of(conversion) == {"blocks.0": INT8, "blocks.1": "int8_switchback_vectorwise"}
    conversion = lq_plugin.convert(Net(), {"blocks.0": auto})
    assert formats_of(conversion) == {"blocks.0": INT8, "blocks.1": None}
    with pytest.raises(ValueError, match=r"only 0.0% of the weights .* matches no pattern: 0"):
        lq_plugin.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(16, 16)), {"1": auto})


def test_nothing_faster_is_no_error_but_a_pattern_without_a_layer_is(written) -> None:
    auto = Auto(written(NONE_IS_FASTER))
    model = Net()
    conversion = lq_plugin.convert(model, auto)
    assert not conversion.converted
    assert type(model.blocks[0]) is nn.Linear
    assert str(conversion).splitlines()[-1].startswith("none: 0.0% of the weights")
    with pytest.raises(ValueError, match="pattern 'absent' matches no linear layer"):
        lq_plugin.convert(model, {"absent": auto})
    with pytest.raises(ValueError, match="no linear layer to convert"):
        lq_plugin.convert(nn.ReLU(), auto)


def test_the_sides_of_a_conv1d_are_those_of_its_linear(written) -> None:
    class Conv1D(nn.Module):
        def __init__(self, fan_in: int, fan_out: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(fan_in, fan_out)), nn.Parameter(torch.zeros(fan_out))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias

    auto = Auto(written(WIDE_IS_FASTER))
    model = nn.Sequential(Conv1D(32, 64), Conv1D(64, 32))
    assert formats_of(lq_plugin.convert(model, auto)) == {"0": INT8, "1": None}
    assert formats_of(lq_plugin.convert(model, auto)) == {"0": INT8, "1": None}


def test_a_layer_goes_back_to_16_bits_unless_its_user_built_it(written) -> None:
    auto = Auto(written(NONE_IS_FASTER))
    model = nn.Sequential(nn.Linear(32, 32), SwitchBackLinearVectorwise(32, 32))
    lq_plugin.convert(model)
    assert formats_of(lq_plugin.convert(model, auto)) == {"0": None, "1": INT8}
    assert type(model[0]) is nn.Linear


def test_what_is_always_left_alone_stays_so_and_a_frozen_layer_stays_frozen(stored) -> None:
    model = nn.ModuleDict({"body": nn.Linear(32, 32), "base": nn.Linear(32, 32), "lm_head": nn.Linear(32, 64)})
    lq_plugin.convert(model, {"base": "nf4"}, partial=True)
    conversion = lq_plugin.convert(model, "auto", device="cpu")
    assert formats_of(conversion) == {"body": INT8, "base": "nf4", "lm_head": None}
    assert "output embedding" in str(conversion)


def test_fused_experts_stay_in_16_bits_and_count_as_not_quantised(stored) -> None:
    class Experts(nn.Module):
        has_gate, has_bias, is_transposed, num_experts = True, False, False, 4

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 16, 16))

    model = nn.ModuleDict({"experts": Experts(), "proj": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match=r"only 7.7% of the weights .*auto: fused experts train in 16"):
        lq_plugin.convert(model, "auto", device="cpu")
    conversion = lq_plugin.convert(model, "auto", device="cpu", partial=True)
    assert formats_of(conversion) == {"experts.gate_up_proj": None, "experts.down_proj": None, "proj": INT8}


def test_auto_trains_and_so_has_no_place_where_weights_are_frozen() -> None:
    with pytest.raises(ValueError, match="auto trains the weights it multiplies: expected frozen formats"):
        frozen_plan(Net(), "auto")
    with pytest.raises(ValueError, match="lora needs a frozen base format"):
        QuantPlugin(linear="auto", lora=object())


def test_a_policy_resolves_auto_once_the_device_is_known(stored) -> None:
    policy = Policy.of({"up": "auto", "down": INT8}, ())
    assert policy.is_auto
    assert policy.notes == ()
    assert isinstance(policy.on(H200).decide("up")[0], Chooser)
    assert policy.on(H200).decide("down") == (TRAINABLE_FORMATS[INT8], "")
    assert not Policy.of(INT8, ()).is_auto


def trainer(plugin: QuantPlugin, folder: Path, **arguments: Any) -> Trainer:
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return Trainer(
        accelerator="cpu", plugins=[plugin], default_root_dir=folder, **(dict.fromkeys(off, False) | arguments)
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 32)), 4)


def test_the_plugin_chooses_for_the_device_of_its_strategy(
    tmp_path: Path, written, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    trainer(QuantPlugin(linear=Auto(written(WIDE_IS_FASTER))), tmp_path, max_epochs=1).fit(model, loader())
    assert [type(block) for block in model.blocks] == [QuantLinear, nn.Linear]
    assert "auto: 16 bits are faster at 32 -> 32" in capsys.readouterr().out
    trainer(QuantPlugin(linear="auto"), tmp_path, max_epochs=1).fit(model, loader())
    assert [type(block) for block in model.blocks] == [QuantLinear, QuantLinear]


def test_a_run_goes_on_in_the_formats_that_its_checkpoint_records(tmp_path: Path, written) -> None:
    """Where "auto" chooses as before; where it does not, as on another device, only when told to."""
    auto = Auto(written(WIDE_IS_FASTER))
    first = trainer(QuantPlugin(linear=auto), tmp_path, max_epochs=1)
    first.fit(Net(), loader())
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    recorded = torch.load(path, weights_only=True)["lq_plugin"]["linear"]
    assert recorded == {"blocks.0": INT8}

    def resume(**arguments: Any) -> Net:
        model = Net()
        runner = trainer(QuantPlugin(**arguments), tmp_path, max_epochs=2)
        runner.fit(model, loader(), ckpt_path=path, weights_only=True)
        return model

    assert isinstance(resume(linear=auto).blocks[0], QuantLinear)
    message = r"'blocks.0' was trained in int8_switchback and is now in no format: linear='auto' chooses by device"
    with pytest.raises(ValueError, match=message):
        resume(linear=Auto(written(NONE_IS_FASTER)))
    assert formats_of(report_of(resume(linear=recorded, partial=True))) == {"blocks.0": INT8, "blocks.1": None}


def test_sharded_layers_that_auto_left_alone_are_not_taken_for_forgotten(written, monkeypatch) -> None:
    monkeypatch.setattr(QuantPlugin, "_convert", None)  # under ModelParallelStrategy nothing is converted here
    model = Net()
    strategy = ModelParallelStrategy()
    monkeypatch.setattr(ModelParallelStrategy, "root_device", torch.device("cpu"))
    model._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    QuantPlugin(linear=Auto(written(NONE_IS_FASTER)))._converted_earlier(model)
    for forgotten in (Auto(written(WIDE_IS_FASTER)), "int8_switchback"):
        with pytest.raises(ValueError, match="layers are converted before they are sharded"):
            QuantPlugin(linear=forgotten)._converted_earlier(model)
