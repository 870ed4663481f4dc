"""What counts as a register that is read though nothing has written it."""

import pytest
from unset_registers import unset_registers


def dump(*lines: str) -> str:
    """As cuobjdump prints them, 16 bytes apart."""
    return "".join(f"        /*{16 * i:04x}*/         {line} ;    /* 0x0 */\n" for i, line in enumerate(lines))


# Two codes in the lower half of R44, beside two more in R12, which is stored; then their upper byte is taken from R35.
LOOP = (
    "MOV R1, c[0x0][0x28]",
    "MOV R2, c[0x0][0x210]",
    "LDG.E.64 R4, desc[UR16][R2.64]",  # 0x20: the loop
    "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R44, R4, R5, RZ",
    "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R12, R5, R4, R44",
    "STG.E desc[UR16][R2.64], R12",
    "{copy}",
    "LOP3.LUT R35, R35, 0xffff, RZ, 0xc0, !PT",
    "SHF.R.U32.HI R33, RZ, 0x8, R35",
    "STS [R2], R33",
    "{late}",
    "@P1 BRA 0x20",
    "EXIT",
)
COPY = "PRMT R35, R12, 0x7610, R35"


def test_a_copy_behind_the_place_that_needs_it_is_seen() -> None:
    for copy, late, expected in ((COPY, "NOP", []), ("NOP", COPY, ["R35"])):
        assert unset_registers(dump(*(line.format(copy=copy, late=late) for line in LOOP))) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["MOV R2, R3", "STG.E desc[UR4][R2.64], R2"], ["R3"]),
        (["MOV R2, R3"], []),  # nothing comes of it
        (["MOV R2, 0x1", "STG.E.64 desc[UR4][R2.64], R2"], []),
        (["IADD3 R1, R1, 0x8, RZ", "STL [R1], RZ"], []),  # the stack
        (["MOV R2, 0x1", "SHFL.BFLY PT, R3, R2, 0x1, 0x1f", "STS [R2], R3"], []),
        # Half a register
        (["MOV R2, 0x1", "PRMT R3, R2, 0x7610, R3", "STS.U16 [R2], R3"], []),
        (["MOV R2, 0x1", "PRMT R3, R2, 0x7610, R3", "STS [R2], R3"], ["R3"]),
        (["MOV R2, 0x1", "PRMT R3, R2, 0x7610, R3", "IMAD.U32 R4, R3, 0x10000, RZ", "STS [R2], R4"], []),
        (["MOV R2, 0x1", "PRMT R3, R2, 0x7632, R3", "HADD2.F32 R4, -RZ, R3.H0_H0", "STS [R2], R4"], []),
        (["MOV R2, 0x1", "PRMT R3, R2, 0x7632, R3", "HADD2.F32 R4, -RZ, R3.H1_H1", "STS [R2], R4"], ["R3"]),
        # Of several ways one writes it, or none
        (["@P0 BRA 0x20", "MOV R2, 0x1", "STS [RZ], R2"], []),
        (["BRA 0x20", "MOV R2, 0x1", "STS [RZ], R2"], ["R2"]),
        (["@P0 MOV R2, 0x1", "STS [RZ], R2"], []),
        # A function at 0x30 that writes R2
        (["CALL.REL.NOINC 0x30", "STS [RZ], R2", "EXIT", "MOV R2, 0x1", "RET.REL.NODEC R8 0x0"], ["R8"]),
        (["CALL.REL.NOINC 0x30", "STS [RZ], R4", "EXIT", "MOV R2, 0x1", "RET.REL.NODEC R8 0x0"], ["R4", "R8"]),
    ],
)
def test_registers_that_nothing_has_written(lines: list[str], expected: list[str]) -> None:
    assert unset_registers(dump(*lines, "EXIT")) == expected
