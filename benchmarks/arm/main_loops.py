"""The main loops of the products, fp32, fp16 and bf16: whether they reach their share of the modelled FMA peak
(llvm-mca), and a second opinion by OSACA."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MAIN_LOOP = 0.95  # of the peak of the vector pipes
PEAK = {"neoverse-n1": 2, "neoverse-v1": 4, "neoverse-v2": 4}  # FMA a cycle
# by source: its vectors, and the cores on which its loops are held to their share
SOURCES = {
    "neon": ("VecNeon", ("neoverse-n1", "neoverse-v1")),
    "neon_fp16": ("VecHalf", ("neoverse-n1", "neoverse-v1")),
    "neon_bf16": ("VecBf16", ("neoverse-v1", "neoverse-v2")),
}
# cores of OSACA, FMA a cycle, and the sources whose instructions they have
SECOND = {"N1": (2, ("neon", "neon_fp16")), "V2": (4, ("neon", "neon_fp16")), "A72": (1, ("neon",))}


@dataclass(frozen=True)
class MainLoop:
    """The loop over units of 16 terms of the tallest tile, without the jumps."""

    source: str
    name: str
    code: str
    fma: int
    others: int  # of the vector pipes: in fp16 additions that keep what a sum loses, in bf16 what joins two pixels
    stores: int

    @property
    def held(self) -> tuple[str, ...]:
        return SOURCES[self.source][1]

    def of_peak(self, cycles_: float, peak: int) -> float:
        return self.fma / cycles_ / peak

    def busy(self, cycles_: float, peak: int) -> float:
        return (self.fma + self.others) / cycles_ / peak


def _found(build: Path) -> list[MainLoop]:
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from test_disassembly import SHAPE, _tiles, main_loop

    found = []
    for source, (vector, _) in SOURCES.items():
        (file,) = (p for p in build.rglob(f"{source}.cpp.o"))
        tiles = {}
        for name, body in _tiles("aarch64-linux-gnu-objdump", file).items():
            if (shape := SHAPE.search(name)) and shape[1] == vector and shape[3] == "1" and shape[5] != "1":
                tiles[int(shape[2]), shape[4]] = body
        rows = max(rows for rows, _ in tiles)
        for packed in "01":
            loop = main_loop(tiles[rows, packed], vector, rows)
            code = "\n".join(f"{i.name} {i.operands.split('//')[0].split('<')[0]}" for i in loop if i.target is None)
            others = sum(i.name in ("fadd", "fsub", "zip1", "zip2") for i in loop)
            name = f"{source} {rows} pixels x 16 channels, packed {packed}"
            stores = sum(i.is_store for i in loop)
            found.append(MainLoop(source, name, code, sum(i.is_fma for i in loop), others, stores))
    return found


def _mca(code: str, cpu: str) -> float:
    """Modelled cycles of a pass of a loop."""
    output = subprocess.run(
        ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+fullfp16,+bf16", "-iterations=1000"],
        input=code, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"Total Cycles:\s+(\d+)", output)
    assert found is not None
    return int(found[1]) / 1000


def check(build: Path) -> list[str]:
    """What is wrong with the main loops; prints their share of the peak."""
    wrong = []
    for loop in _found(build):
        for cpu in loop.held:
            cycles_, peak = _mca(loop.code, cpu), PEAK[cpu]
            share, busy = loop.of_peak(cycles_, peak), loop.busy(cycles_, peak)
            print(
                f"{loop.name}: {share:.1%} of the FMA peak on {cpu}, {busy:.1%} with additions and moves, "
                f"{loop.stores} vector stores"
            )
            if busy < MAIN_LOOP:
                wrong.append(f"the main loop of {loop.name} reaches {busy:.1%} on {cpu}, expected {MAIN_LOOP:.0%}")
    return wrong


def _for_osaca(code: str) -> str:
    """In instructions that its tables have: loads of several registers as pairs with one step at the end, fp16 as fp32,
    which takes as long."""
    lines: list[str] = []
    steps: Counter[str] = Counter()
    for line in code.splitlines():
        line = re.sub(r"\.8h", ".4s", re.sub(r"\.h\[(\d)\]", lambda m: f".s[{int(m[1]) % 4}]", line))
        if (found := re.match(r"ld1 \{(.*)\}, \[(\w+)\], #(\d+)$", line)) is None:
            lines.append(line)
            continue
        first, last = (int(n) for n in re.findall(r"v(\d+)", found[1]))
        at = steps[found[2]] - 16 * first
        lines += [f"ldp q{n}, q{n + 1}, [{found[2]}, #{at + 16 * n}]" for n in range(first, last + 1, 2)]
        steps[found[2]] += int(found[3])
    return "\n".join([*lines, *(f"add {pointer}, {pointer}, #{step}" for pointer, step in steps.items()), ""])


def _osaca(code: str, core: str, command: Path) -> float:
    """Cycles of a pass: those of the busiest port, or of the longest chain from one pass to the next."""
    output = subprocess.run(
        [command, "--arch", core, "--ignore-unknown", "/dev/stdin"],
        input=_for_osaca(code), capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    # the last line of the table: pressure of each port, critical path, loop-carried dependency
    (sums,) = re.findall(r"^ {6,}([\d. ]+)$", output, re.M)
    *ports, _, carried = map(float, sums.split())
    return max(*ports, carried)


def opinions(build: Path, osaca: Path) -> list[dict[str, Any]]:
    rows = []
    for loop in _found(build):
        row = {"name": loop.name, "fma": loop.fma, "others": loop.others}
        of = {cpu: _mca(loop.code, cpu) for cpu in PEAK if cpu in (*loop.held, "neoverse-v2")}
        theirs = {core: _osaca(loop.code, core, osaca) for core, (_, has) in SECOND.items() if loop.source in has}
        rows.append(row | {"llvm-mca": of, "OSACA": theirs})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    text = [
        "",
        "## Main loops of the products: llvm-mca 19 and OSACA 0.7.1",
        "",
        "Cycles of a pass; in brackets the share of the vector pipes' time (products, in fp16 also the additions that",
        "keep what a sum loses, in bf16 what joins two pixels). OSACA knows no Neoverse V1 and no products of bf16. It",
        "is given loads of several registers as pairs, and fp16 as fp32, which its tables know and which take as long.",
        "By `benchmarks/arm/count.py osaca`.",
        "",
        "| loop | vector operations | llvm-mca: n1 | v1 | v2 | OSACA: N1 | V2 | A72 |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        work = row["fma"] + row["others"]
        pipes = PEAK | {core: n for core, (n, _) in SECOND.items()}
        cells = [row["name"], str(work)]
        for core, n in pipes.items():
            cycles = row["llvm-mca"].get(core) or row["OSACA"].get(core)
            cells.append(f"{cycles:.1f} ({work / cycles / n:.0%})" if cycles else "-")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"
