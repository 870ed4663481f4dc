"""QuantState: what it holds, its form in checkpoints, and what it refuses to read."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lq_kernels.codebooks import dynamic_map, four_bit_map
from lq_kernels.quant_state import QuantState

CPU = torch.device("cpu")


def state_4bit(quant_type: str = "nf4", nested: bool = True) -> QuantState:
    """Of a weight (64, 70) in 70 blocks of 64."""
    state = QuantState(
        absmax=torch.rand(70),
        shape=torch.Size((64, 70)),
        code=four_bit_map(quant_type),
        blocksize=64,
        quant_type=quant_type,
        dtype=torch.bfloat16,
    )
    if nested:
        state.absmax = torch.randint(256, (70,), dtype=torch.uint8)
        state.offset = torch.tensor(2.656217575073242)
        state.state2 = QuantState(torch.rand(1), code=dynamic_map("dynamic"), blocksize=256, dtype=torch.float32)
    return state


def state_8bit(nested: bool) -> QuantState:
    state = QuantState(torch.rand(5), code=dynamic_map("dynamic"), blocksize=64, dtype=torch.float16)
    if nested:
        state.absmax = torch.randint(256, (5,), dtype=torch.uint8)
        state.offset = torch.tensor(0.1)
        state.state2 = QuantState(torch.rand(1), code=dynamic_map("dynamic"), blocksize=64, dtype=torch.float32)
    return state


def packed(quant_type: str = "nf4", nested: bool = True) -> dict[str, Any]:
    return state_4bit(quant_type, nested).as_dict(packed=True)


def test_a_nested_state_is_saved_under_these_names_and_as_this_text() -> None:
    entries = packed()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in entries.items()} == {
        "absmax": (torch.uint8, (70,)),
        "quant_map": (torch.float32, (16,)),
        "nested_absmax": (torch.float32, (1,)),
        "nested_quant_map": (torch.float32, (256,)),
        "quant_state.bitsandbytes__nf4": (torch.uint8, (165 + 1,)),
    }
    assert bytes(entries["quant_state.bitsandbytes__nf4"].tolist()) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 70], '
        b'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.656217575073242}'
    )


def test_a_plain_state_is_saved_without_nested_entries() -> None:
    entries = packed("fp4", nested=False)
    assert set(entries) == {"absmax", "quant_map", "quant_state.bitsandbytes__fp4"}
    text = b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 70]}'
    assert bytes(entries["quant_state.bitsandbytes__fp4"].tolist()) == text


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_safetensors_give_the_state_back(quant_type: str, nested: bool) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = state_4bit(quant_type, nested)
    file = safetensors.save({f"layers.0.weight.{name}": value for name, value in state.as_dict(packed=True).items()})
    again = QuantState.from_dict(safetensors.load(file), CPU)
    assert again == state
    assert again.nested == nested
    assert torch.equal(again.absmax, state.absmax)
    assert again.offset is None or torch.equal(again.offset, state.offset)


@pytest.mark.parametrize("nested", [False, True])
def test_unpacked_states_of_8_and_4_bits_come_back(nested: bool) -> None:
    for state in (state_8bit(nested), state_4bit(nested=nested)):
        assert QuantState.from_dict(state.as_dict(), device="cpu") == state


def test_entries_may_come_in_any_order() -> None:
    state = state_4bit()
    entries = state.as_dict(packed=True)
    values = json.loads(bytes(entries.pop("quant_state.bitsandbytes__nf4").tolist()))
    text = json.dumps(dict(reversed(values.items()))).encode()
    entries = {"quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)} | entries
    assert QuantState.from_dict(dict(reversed(entries.items())), CPU) == state


def test_two_states_share_no_memory_in_a_file() -> None:
    states = [state_4bit(), state_4bit()]
    tensors = [value for state in states for value in state.as_dict(packed=True).values()]
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)


def test_states_are_equal_when_they_read_alike() -> None:
    state = state_4bit()
    same = copy.deepcopy(state)
    assert same == state
    same.state2.absmax += 1e-7
    assert same == state
    same.state2.absmax += 1e-5
    assert same != state
    assert state != "a state"
    for name, value in (
        ("absmax", state.absmax ^ 1),
        ("absmax", state.absmax[1:]),
        ("absmax", state.absmax.to("meta")),
        ("shape", torch.Size((70, 64))),
        ("code", four_bit_map("fp4")),
        ("code", None),
        ("blocksize", 128),
        ("quant_type", "fp4"),
        ("dtype", torch.float32),
        ("offset", torch.tensor(2.0)),
        ("offset", None),
        ("state2", None),
    ):
        other = copy.deepcopy(state)
        setattr(other, name, value)
        assert other != state, name


def test_to_moves_every_tensor_and_gives_the_state() -> None:
    state = state_4bit()
    assert state.to("meta") is state
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert {value.device.type for value in tensors} == {"meta"}
    plain = state_8bit(nested=False).to("meta")
    assert (plain.absmax.device.type, plain.offset, plain.state2) == ("meta", None, None)


def test_a_state_on_the_meta_device_has_sizes_and_no_values() -> None:
    entries = packed()
    for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        entries[name] = entries[name].to("meta")
    assert QuantState.from_dict(entries, "meta").absmax.shape == (70,)


def test_an_8_bit_state_has_no_packed_form() -> None:
    with pytest.raises(ValueError, match="only 4-bit states have a packed form"):
        state_8bit(nested=True).as_dict(packed=True)


def with_json(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces values of the JSON object; None drops one."""

    def change(entries: dict[str, Any]) -> None:
        values = json.loads(bytes(entries["quant_state.bitsandbytes__nf4"].tolist())) | changes
        text = json.dumps({name: value for name, value in values.items() if value is not None}).encode()
        entries["quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def with_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces entries; None drops one."""

    def change(entries: dict[str, Any]) -> None:
        entries |= changes
        for name in [name for name, value in entries.items() if value is None]:
            del entries[name]

    return change


def with_text(text: bytes) -> Callable[[dict[str, Any]], None]:
    return with_entry(**{"quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)})


def under_the_other_name(entries: dict[str, Any]) -> None:
    entries["quant_state.bitsandbytes__fp4"] = entries.pop("quant_state.bitsandbytes__nf4")


BROKEN = {
    "nothing": (dict.clear, "without absmax"),
    "no absmax": (with_entry(absmax=None), "without absmax"),
    "no map": (with_entry(quant_map=None), "without quant_map"),
    "half of what is nested": (with_entry(nested_absmax=None), "without nested_absmax"),
    "no nested offset": (with_json(nested_offset=None), "without nested_offset"),
    "no JSON object": (with_entry(**{"quant_state.bitsandbytes__nf4": None}), "without blocksize, dtype"),
    "two JSON objects": (with_entry(bitsandbytes__fp4=torch.zeros(3, dtype=torch.uint8)), "exactly one of"),
    "an unknown format": (with_entry(bitsandbytes__af4=torch.zeros(3, dtype=torch.uint8)), "exactly one of"),
    "another format's name": (under_the_other_name, "holds a state of quant_type 'nf4'"),
    "an unknown entry": (with_entry(zero_point=torch.zeros(3)), "has no zero_point"),
    "an unknown value": (with_json(version=2), "has no version"),
    "a value and an entry": (with_entry(blocksize=64), "beside it"),
    "two weights": (with_entry(**{"other.absmax": torch.zeros(70, dtype=torch.uint8)}), "is there twice"),
    "no JSON": (with_text(b"{"), "does not hold a JSON object"),
    "no UTF-8": (with_text(b'"\xff"'), "does not hold a JSON object"),
    "a JSON list": (with_text(b"[1]"), "does not hold a JSON object but list"),
    "JSON without an end": (with_text(b"[" * 100_000), "does not hold a JSON object"),
    "JSON of floats": (with_entry(**{"quant_state.bitsandbytes__nf4": torch.zeros(3)}), "must be uint8"),
    "JSON as a string": (with_entry(**{"quant_state.bitsandbytes__nf4": "{}"}), "got str"),
    "another quant_type": (with_json(quant_type="fp4"), "holds a state of quant_type 'fp4'"),
    "a blocksize of no kernel": (with_json(blocksize=48), "blocksize must be one of"),
    "a blocksize of 0": (with_json(blocksize=0), "blocksize must be one of"),
    "a blocksize that is true": (with_json(blocksize=True), "blocksize must be one of"),
    "another blocksize": (with_json(blocksize=128), "absmax must be torch.uint8 of one dimension and length 35"),
    "another shape": (with_json(shape=[64, 80]), "length 80"),
    "a negative shape": (with_json(shape=[-64, -70]), "shape must be a list of sizes"),
    "a shape of floats": (with_json(shape=[64.0, 70.0]), "shape must be a list of sizes"),
    "a shape that is a word": (with_json(shape="64x70"), "shape must be a list of sizes"),
    "an unknown dtype": (with_json(dtype="float64"), "dtype must be one of"),
    "a dtype that is a list": (with_json(dtype=[1]), "dtype must be one of"),
    "a nested blocksize of 0": (with_json(nested_blocksize=0), "nested_blocksize must be positive"),
    "an unknown nested dtype": (with_json(nested_dtype="int8"), "nested_dtype must be one of"),
    "an offset that is a word": (with_json(nested_offset="2"), "nested_offset must be a number"),
    "a short absmax": (with_entry(absmax=torch.zeros(69, dtype=torch.uint8)), "length 70"),
    "absmax with two dimensions": (with_entry(absmax=torch.zeros(70, 1, dtype=torch.uint8)), "length 70"),
    "absmax that is not nested": (with_entry(absmax=torch.zeros(70)), "must be torch.uint8"),
    "a list as absmax": (with_entry(absmax=[0] * 70), "got list"),
    "a long nested absmax": (with_entry(nested_absmax=torch.zeros(2)), "nested_absmax must be torch.float32"),
    "a map in half precision": (with_entry(quant_map=four_bit_map("nf4").half()), "quant_map must be torch.float32"),
    "the other map": (with_entry(quant_map=four_bit_map("fp4")), "quant_map is not the map of 'nf4'"),
    "a map with a NaN": (with_entry(quant_map=torch.full((16,), torch.nan)), "quant_map is not the map of 'nf4'"),
    "another nested map": (with_entry(nested_quant_map=torch.linspace(-1, 1, 256)), "nested_quant_map is not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_state_is_refused(case: str) -> None:
    change, phrase = BROKEN[case]
    entries = packed()
    change(entries)
    with pytest.raises(ValueError, match=phrase):
        QuantState.from_dict(entries, CPU)


def test_no_changed_byte_of_the_json_does_anything_but_read_or_raise_value_error() -> None:
    entries = packed()
    text = entries["quant_state.bitsandbytes__nf4"]
    refused = 0
    for position in range(len(text)):
        for byte in (0, ord("9"), ord("-"), ord("}"), 255):
            changed = text.clone()
            changed[position] = byte
            try:
                QuantState.from_dict(entries | {"quant_state.bitsandbytes__nf4": changed}, CPU)
            except ValueError:
                refused += 1
    # What is left are other digits of the offset.
    assert refused > 0.9 * 5 * len(text)


def test_nothing_is_unpickled(tmp_path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    payload = pickle.dumps(Harmful())
    entries = packed()
    with_text(payload)(entries)
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        QuantState.from_dict(entries, CPU)
    assert not list(tmp_path.iterdir())
