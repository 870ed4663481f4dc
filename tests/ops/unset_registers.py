"""Registers that machine code reads though nothing has written them: a compiler's mistake, which the interpreter hides.

ptxas 12.8 and 12.9 make one where a loop stores fp8 codes as words and takes the same two codes apart as well:

    cvt.rn.satfinite.e4m3x2.f32 pair, a, b;   mov.b32 word, {pair, other};   shr.u16 upper, pair, 8;

The copy of `pair` from which `upper` is taken comes behind the place where that is done, so that the first round takes
what the register held before. Registers are looked at byte by byte: half of one is often left unset on purpose.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

# A set of bytes of registers is an int: bit 4 * n + i is byte i of register n.
_ALL, _LOWER, _UPPER = 0b1111, 0b0011, 0b1100

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?(\S+)"
    r"(?: P\w,)?"  # a predicate that it writes too
    r"([^;]*);",
    re.MULTILINE,
)
_REGISTER = re.compile(r"\bR(\d+)\b")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
_WITHOUT_RESULT = re.compile(r"ST|RED|BAR|BRA|BSSY|BSYNC|EXIT|RET|CALL|NOP|\w*SETP|R2P|R2UR|WARPSYNC|DEPBAR|SYNCS|UTMA")
_WIDE = ((re.compile(r".*MMA"), 128), (re.compile(r".*\.128|LDSM"), 4), (re.compile(r".*(\.64|WIDE)|CS2R|D[AFM]"), 2))
_SHIFTS = {f"0x{1 << 8 * i:x}": i for i in (1, 2, 3)}  # factors
_PARTS = {"H0_H0": _LOWER, "H0": _LOWER, "H1_H1": _UPPER, "H1": _UPPER, **{f"B{i}": 1 << i for i in range(4)}}
_STORED = {"U8": 0b1, "S8": 0b1, "U16": _LOWER, "S16": _LOWER}


@dataclass(frozen=True)
class Instruction:
    address: int
    always: bool
    name: str  # with its modifiers
    operands: tuple[str, ...]

    @cached_property
    def written(self) -> int:
        """What it may write: the registers of a matrix product, or of a load of 16 bytes, lie side by side."""
        if not self.operands or _WITHOUT_RESULT.match(self.name) or not _REGISTER.fullmatch(self.operands[0]):
            return 0
        width = next((width for pattern, width in _WIDE if pattern.match(self.name)), 1)
        return ((1 << 4 * width) - 1) << 4 * int(self.operands[0][1:])

    @cached_property
    def sources(self) -> tuple[str, ...]:
        operands = self.operands[1:] if self.written else self.operands
        return tuple(operand.replace(".reuse", "") for operand in operands)

    @cached_property
    def _all_sources(self) -> int:
        found = 0
        for source in self.sources:
            part = _PARTS.get(source.rpartition(".")[2], _ALL)
            if self.name.startswith("ST") and source == self.sources[-1]:
                part = next((_STORED[word] for word in self.name.split(".") if word in _STORED), _ALL)
            for number in _REGISTER.findall(source):
                found |= part << 4 * int(number)
        return found

    @cached_property
    def _moves(self) -> Callable[[int], list[tuple[str, int]]] | None:
        """Byte of the result -> bytes of sources that it is made of, where the instruction moves whole bytes."""
        s = self.sources
        if self.name == "PRMT" and _NUMBER.fullmatch(s[1]):
            picks = int(s[1], 0)
            return lambda byte: [(s[0] if picks >> 4 * byte & 4 == 0 else s[2], picks >> 4 * byte & 3)]
        if "MERGE_C" in self.name:
            return lambda byte: [(s[2], byte - 2)] if byte > 1 else [(source, i) for source in s[:2] for i in range(4)]
        if self.name == "LOP3.LUT" and _NUMBER.fullmatch(s[1]) and s[3] == "0xc0":
            return lambda byte: [(s[0], byte)] if int(s[1], 0) >> 8 * byte & 255 else []
        if self.name == "LOP3.LUT":
            return lambda byte: [(source, byte) for source in s[:3]]
        if self.name in ("IMAD.U32", "IMAD.SHL.U32") and s[1] in _SHIFTS and s[2] == "RZ":
            return lambda byte: [(s[0], byte - _SHIFTS[s[1]])] if byte >= _SHIFTS[s[1]] else []
        if self.name == "SHF.R.U32.HI" and s[0] == "RZ" and s[1] in ("0x8", "0x10", "0x18"):
            return lambda byte: [(s[2], byte + int(s[1], 16) // 8)] if byte + int(s[1], 16) // 8 < 4 else []
        if self.name in ("MOV", "IMAD.MOV.U32"):
            return lambda byte: [(s[-1], byte)]
        return None

    def before(self, live: int) -> int:
        """The bytes that matter in front of it, where `live` matter behind it."""
        if self.written and not self.written & live and "MMA" not in self.name:
            return live
        if self._moves is None or not self.written:
            return live & ~self.written | self._all_sources
        wanted = live >> 4 * int(self.operands[0][1:]) & _ALL
        found = live & ~self.written
        for source, byte in (move for i in range(4) if wanted >> i & 1 for move in self._moves(i)):
            if register := _REGISTER.fullmatch(source):
                found |= 1 << 4 * int(register[1]) + byte
        return found


def unset_registers(sass: str) -> list[str]:
    """Those that are read where no way from the start on, without a jump back, has written them.

    sass is the dump of one kernel by cuobjdump. A register that some ways write and others do not is none: which of
    them are taken is not known here.
    """
    code = [
        Instruction(int(address, 16), not predicate, name, tuple(re.split(r"\s*,\s*", operands.strip())))
        for address, predicate, name, operands in _INSTRUCTION.findall(sass)
    ]
    followers = _followers(code)
    live = _live(code, followers)
    written = [0] * (len(code) + 1)
    written[0] = _ALL << 4  # R1, the stack
    unset = 0
    for i, one in enumerate(code):
        if not written[i]:
            continue  # no way leads here
        behind = 0
        for follower in followers[i]:
            behind |= live[follower]
        unset |= one.before(behind) & ~(behind & ~one.written) & ~written[i]
        after = written[i] | one.written
        for follower in followers[i]:
            if follower > i:
                written[follower] |= after
        if one.name.startswith("CALL"):
            written[i + 1] |= after | _written_by_function(code, followers, i)
    return [f"R{n}" for n in range(255) if unset >> 4 * n & _ALL]


def _written_by_function(code: list[Instruction], followers: list[list[int]], call: int) -> int:
    written, seen, pending = 0, set[int](), list(followers[call])
    while pending:
        i = pending.pop()
        if i not in seen and i < len(code):
            seen.add(i)
            written |= code[i].written
            pending += [] if code[i].name.startswith("RET") else followers[i]
    return written


def _live(code: list[Instruction], followers: list[list[int]]) -> list[int]:
    """The bytes that matter in front of each instruction."""
    live = [0] * (len(code) + 1)
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(code))):
            behind = 0
            for follower in followers[i]:
                behind |= live[follower]
            before = code[i].before(behind)
            changed |= before != live[i]
            live[i] = before
    return live


def _followers(code: list[Instruction]) -> list[list[int]]:
    """Of each instruction; a return may go behind every call."""
    at = {one.address: i for i, one in enumerate(code)}
    behind_calls = [i + 1 for i, one in enumerate(code) if one.name.startswith("CALL")]
    found = []
    for i, one in enumerate(code):
        jumps, returns = one.name.startswith(("BRA", "CALL")), one.name.startswith("RET")
        following = [] if one.always and (jumps or returns or one.name == "EXIT") else [i + 1]
        targets = re.findall(r"\b0x([0-9a-f]+)", one.operands[-1]) if jumps else []
        following += [at[int(target, 16)] for target in targets if int(target, 16) in at]
        found.append(following + behind_calls if returns else following)
    return found
