"""The k-loops of the GEMM tiles of the installed module keep their accumulators in registers: no vector store inside.

Also a command, for an object of another architecture: python tests/test_disassembly.py OBJDUMP FILE
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# FMA instructions from which on a loop counts as a k-loop: two terms, four accumulators
MIN_FMA = 2 * 4
TILE = re.compile(r"^[0-9a-f]+ <(_ZN.*(?:9gemm_tile|10lane_tiles|10half_tiles|10bf16_tiles|10term_tiles)I.*)>:$")
# vector type, pixels, units of 16 channels (term_tiles have one), packed, and of half_tiles whether its chains are the
# short ones
SHAPE = re.compile(
    r"(?:9gemm_tile|10lane_tiles|10half_tiles|10bf16_tiles|10term_tiles)INS\w*?_\d+(Vec[0-9A-Za-z]+?)ELi(\d+)E(?:Li(\d+)E)?Lb([01])E"
    r"(?:Lb([01])E)?"
)
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
TARGET = re.compile(r"\b([0-9a-f]+) <")
# sums in a register
LANES = {"Vec512": 16, "Vec256": 8, "VecNeon": 4, "VecHalf": 8, "VecBf16": 4}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @property
    def is_fma(self) -> bool:
        # products that begin a chain of sums are by element
        return self.name.startswith(("vfmadd", "fmla", "bfmmla")) or (self.name == "fmul" and "[" in self.operands)

    @property
    def is_store(self) -> bool:
        if self.name in ("str", "stp", "stur", "st1"):
            return bool(re.match(r"\{?[qv]\d", self.operands))
        # AT&T order: source first, memory last
        return self.name.startswith("vmov") and bool(re.match(r"%[yz]mm\d+,.*\(", self.operands))

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        if not re.match(r"j|b$|b\.|cbn?z|tbn?z", self.name):
            return None
        found = TARGET.search(self.operands)
        return int(found[1], 16) if found else None


def _tiles(objdump: str, file: Path) -> dict[str, list[Instruction]]:
    """Instructions of each instance of gemm_tile and its kin, by its mangled name."""
    text = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(file)], capture_output=True, text=True, check=True
    ).stdout
    tiles: dict[str, list[Instruction]] = {}
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if line.endswith(">:"):
            found = TILE.match(line)
            body = tiles.setdefault(found[1], []) if found else None
        elif body is not None and (match := LINE.match(line)):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    return tiles


def _innermost_loops(body: list[Instruction], exits: bool = False) -> list[list[Instruction]]:
    """Straight runs of instructions that end in a jump to their first one; `exits`: they may be left in between."""
    loops = []
    for end, jump in enumerate(body):
        if jump.target is None or not body[0].address <= jump.target <= jump.address:
            continue
        loop = [i for i in body[: end + 1] if i.address >= jump.target]
        inner = [i.target for i in loop[:-1] if i.target is not None]
        if not inner or (exits and all(not jump.target <= target <= jump.address for target in inner)):
            loops.append(loop)
    return loops


def accumulators(vector: str, rows: int, units: int = 1) -> int:
    """Registers of the sums of a tile; in VecBf16 two pixels share theirs."""
    return (rows + rows % 2 if vector == "VecBf16" else rows) * units * 16 // LANES[vector]


def main_loop(body: list[Instruction], vector: str, rows: int) -> list[Instruction]:
    """The loop over units of 16 terms; in half_tiles, whose turns come in pairs, it may be left after the first one."""
    terms = 4 if vector == "VecBf16" else 1  # of a pixel, in an instruction
    loops = [(sum(i.is_fma for i in loop), loop) for loop in _innermost_loops(body, exits=True)]
    long = [(n / len(loop), loop) for n, loop in loops if n >= 16 // terms * accumulators(vector, rows)]
    return max(long, key=lambda found: found[0], default=(0.0, []))[1]


def problems(objdump: str, file: Path) -> tuple[int, list[str]]:
    """Number of tiles that were looked at, and what is wrong with them."""
    looked_at, wrong = 0, []
    for name, body in _tiles(objdump, file).items():
        shape = SHAPE.search(name)
        if shape is None or shape[1] not in LANES or shape[5] == "1":
            continue
        rows, units = int(shape[2]), int(shape[3] or 1)
        sums = accumulators(shape[1], rows, units)
        label = f"{shape[1]} {rows} pixels x {units} units, packed {shape[4]}"
        if sums < 4:
            continue
        if shape[1] == "VecHalf" and units > 1:  # one pixel, bound by loading weights
            continue
        looked_at += 1
        if shape[1] == "VecHalf":
            loops = [loop] if (loop := main_loop(body, shape[1], rows)) else []
        else:
            loops = [loop for loop in _innermost_loops(body) if sum(i.is_fma for i in loop) >= MIN_FMA]
        if not loops:
            wrong.append(f"{label}: no k-loop was found")
        for loop in loops:
            if sum(i.is_fma for i in loop) % sums:
                wrong.append(f"{label}: {sum(i.is_fma for i in loop)} FMA for {sums} accumulators")
            wrong += [f"{label}: {i.address:x} {i.name} {i.operands}" for i in loop if i.is_store]
    return looked_at, wrong


def test_k_loops_store_nothing() -> None:
    import pytest

    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    core = pytest.importorskip("mnv4_ops._core")
    looked_at, wrong = problems(objdump, Path(core.__file__))
    if looked_at == 0:
        pytest.skip("the module has no gemm_tile symbols: it was stripped or built by another compiler")
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    count, found = problems(sys.argv[1], Path(sys.argv[2]))
    print(f"{count} tiles", *found, sep="\n")
    sys.exit(count == 0 or bool(found))
