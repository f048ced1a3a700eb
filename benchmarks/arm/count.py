"""Counts instructions of the layers under emulation, models their cycles, and compares both with what is recorded.

    python benchmarks/arm/count.py loops BUILD                      main loops reach their share of the FMA peak
    python benchmarks/arm/count.py osaca BUILD OSACA                a second opinion on them, into arm.json and arm.md
    python benchmarks/arm/count.py gate BUILD PLUGIN SYSROOT        instructions as in results/arm.json
    python benchmarks/arm/count.py misses BUILD CACHE SYSROOT [XNNPACK_MISSES]    of simulated caches, into both
    python benchmarks/arm/count.py record BUILD PLUGIN SYSROOT [XNNPACK_BLOCKS]   writes arm.json and arm.md

BUILD has the driver `layers`, PLUGIN is count.c compiled, CACHE cache.c, OSACA the command of that name (pip install
osaca). XNNPACK_BLOCKS is a folder of the plugin's files of xnnpack_run.py, one a model (conv_small.txt: the layers in
order, then the whole model if there is one), XNNPACK_MISSES one of cache.c's; of models without a file what was
recorded stays.
Emulated, counted, modelled: not timed on hardware.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cache_misses
import main_loops

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
CPUS = ("neoverse-n1", "neoverse-v1", "neoverse-v2", "cortex-a55")
CLOSE = 0.01
COVERED = 0.995  # share of the instructions whose blocks are modelled
LIMITS = {"UIB": 0.90, "1x1": 0.95, "depthwise": 0.60, "MQA": 0.95}  # instructions, ours / XNNPACK's, by group
# elements of 16 bits: the emulated core, the modelled ones that have their arithmetic, and of whole models the limit of
# modelled cycles by those of fp32, on the first of these
HALF: dict[str, tuple[str, tuple[str, ...], float]] = {
    "float16": ("neoverse-n1", CPUS, 0.70),
    "bfloat16": ("max,sve=off", ("neoverse-v1", "neoverse-v2"), 0.50),
}
# FMLA (vector) and (by element) of fp32 and fp64, then of fp16, BFMMLA, BFMLALB and BFMLALT: bits of the encoding that
# say so, and their values
FMA = (
    (0xBFA0FC00, 0x0E20CC00), (0xBF80F400, 0x0F801000), (0xBFE0FC00, 0x0E400C00), (0xBFC0F400, 0x0F001000),
    (0xFFE0FC00, 0x6E40EC00), (0xBFE0FC00, 0x2EC0FC00),
)  # fmt: skip
Blocks = Counter[tuple[str, ...]]  # words of a block -> how often it ran


def regions(path: Path) -> list[Blocks]:
    found: list[dict[int, dict[tuple[str, ...], int]]] = []  # of each region: address -> words -> how often
    for line in path.read_text().splitlines():
        if line == "region":
            found.append({})
        else:
            count, address, *words = line.split()
            at = found[-1].setdefault(int(address, 16), {})
            at[tuple(words)] = at.get(tuple(words), 0) + int(count)
    return [_joined(region) for region in found]


def _branches(word: str) -> bool:
    i = int(word, 16)
    return i >> 26 & 0x1F == 5 or i >> 25 & 0x3F == 0x1A or i >> 25 & 0x3F == 0x1B or i >> 25 & 0x7F in (0x2A, 0x6B)


def _joined(region: dict[int, dict[tuple[str, ...], int]]) -> Blocks:
    """Undoes the cuts that the emulator makes at page boundaries and in long blocks: a block without a branch at its
    end goes on in the one behind it, as often as both ran."""
    blocks: Blocks = Counter()
    for address in sorted(region):
        while region[address]:
            words, times = region[address].popitem()
            whole = words
            while not _branches(whole[-1]) and (behind := region.get(address + 4 * len(whole))):
                match = [w for w, n in behind.items() if n >= times]
                if not match:
                    break
                behind[match[0]] -= times
                if behind[match[0]] == 0:
                    del behind[match[0]]
                whole += match[0]
            blocks[whole] += times
    return blocks


def _names(parts: dict[str, Any]) -> list[str]:
    return [*parts["layers"], "whole model"] if parts["model"] else [*parts["layers"]]


def in_half(parts: dict[str, Any]) -> dict[str, Any]:
    """The layers that are counted in 16 bits: all but attention, which is that of fp32 between copies."""
    return parts | {"layers": {k: v for k, v in parts["layers"].items() if not v["line"].startswith("mqa")}}


def emulate(
    build: Path, plugin: Path, sysroot: Path, parts: dict[str, Any], dtype: str = "float32"
) -> dict[str, Blocks]:
    """Blocks of each layer, then of the whole model."""

    def run(text: list[str], *arguments: str) -> list[Blocks]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "blocks.txt"
            command = ["qemu-aarch64", "-cpu", HALF.get(dtype, ("neoverse-n1",))[0], "-L", str(sysroot)]
            command += ["-plugin", f"{plugin},out={out}", str(build / "layers"), dtype, *arguments]
            subprocess.run(command, input="\n".join(text) + "\n", text=True, check=True)
            return regions(out)

    lines = [layer["line"] for layer in parts["layers"].values()]
    with ThreadPoolExecutor(2) as pool:
        layers = pool.submit(lambda: run(lines) if lines else [])
        model = pool.submit(lambda: run(parts["model"], "model") if parts["model"] else [])
        return dict(zip(_names(parts), [*layers.result(), *model.result()], strict=True))


def kinds(blocks: Blocks) -> dict[str, int]:
    """Instructions in all, fused multiply-adds, bytes that vector loads and stores move."""
    count: Counter[str] = Counter()
    for words, times in blocks.items():
        for word in words:
            i = int(word, 16)
            count["instructions"] += times
            if any(i & mask == bits for mask, bits in FMA):
                count["fma"] += times
            elif ((i >> 25) & 5) == 4 and (i >> 26) & 1:  # a load or store of vector registers
                if (i >> 27) & 7 == 5:
                    size = 2 * (4 << (i >> 30))
                elif (i >> 31) == 0 and (i >> 24) & 0x3E == 0x0C:
                    size = (8 << (i >> 30 & 1)) * {7: 1, 10: 2, 6: 3, 2: 4}.get(i >> 12 & 15, 1)
                else:
                    size = 16 if (i >> 23) & 1 else 1 << (i >> 30)
                count["loaded" if (i >> 22) & 1 else "stored"] += times * size
    return dict(count)


def _disassemble(blocks: list[tuple[str, ...]]) -> list[list[str]]:
    """One run of the disassembler; `nop` of an unusual kind ends a block."""
    end = "d503229f"  # hint #20
    words = [w for block in blocks for w in (*block, end)]
    text = "\n".join(" ".join(f"0x{b:02x}" for b in struct.pack("<I", int(w, 16))) for w in words)
    output = subprocess.run(
        ["llvm-mc-19", "--disassemble", "-triple=aarch64", "-mattr=+v8.6a,+fullfp16,+sve2"],
        input=text, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: list[list[str]] = [[]]
    for line in map(str.strip, output.splitlines()):
        if re.fullmatch(r"csdb|hint\s+#20", line):
            found.append([])
        elif line and not line.startswith("."):
            line = re.sub(r"^blr?\s.*", "b .Lx", line)  # a call is modelled as 100 cycles
            found[-1].append(re.sub(r"^((?:b|bl|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?)#-?\d+$", r"\1.Lx", line))
    return found[:-1]


def cycles(all_blocks: list[Blocks]) -> list[dict[str, float]]:
    """Modelled cycles of each region: those of a block in a loop of its own, times how often it ran."""
    chosen: list[list[tuple[tuple[str, ...], int]]] = []
    for blocks in all_blocks:
        total = sum(len(w) * n for w, n in blocks.items())
        kept, covered = [], 0
        for words, times in sorted(blocks.items(), key=lambda b: -len(b[0]) * b[1]):
            kept.append((words, times))
            covered += len(words) * times
            if covered >= COVERED * total:
                break
        chosen.append(kept)
    unique = list({words for kept in chosen for words, _ in kept})
    code = _disassemble(unique)
    assert len(code) == len(unique)
    text = ".Lx:\n" + "".join(
        f"# LLVM-MCA-BEGIN r{i}\n" + "\n".join(lines) + "\n# LLVM-MCA-END\n" for i, lines in enumerate(code)
    )
    result: list[dict[str, float]] = [{} for _ in all_blocks]
    for cpu in CPUS:
        output = subprocess.run(
            ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+v8.6a,+sve2", "-iterations=100",
             "-skip-unsupported-instructions=any"],
            input=text, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        of_block = {
            int(i): int(n) / 100 for i, n in re.findall(r"Code Region - r(\d+)\n.*?Total Cycles:\s+(\d+)", output, re.S)
        }
        for kept, row in zip(chosen, result, strict=True):
            index = {words: i for i, words in enumerate(unique)}
            row[cpu] = round(sum(times * of_block[index[words]] for words, times in kept))
    return result


def gate(build: Path, plugin: Path, sysroot: Path) -> int:
    wrong = []
    recorded = json.loads((RESULTS / "arm.json").read_text())["models"]
    for model, parts in json.loads((HERE / "layers.json").read_text()).items():
        for name, blocks in emulate(build, plugin, sysroot, parts).items():
            row = recorded[model][name]
            now, then = kinds(blocks)["instructions"], row["ours"]["instructions"]
            if abs(now / then - 1) > CLOSE:
                wrong.append(f"{model} {name}: {now} instructions, recorded {then} ({now / then - 1:+.1%})")
            if "XNNPACK" in row and now > LIMITS.get(row["group"], 9.0) * (theirs := row["XNNPACK"]["instructions"]):
                limit = LIMITS[row["group"]]
                wrong.append(f"{model} {name}: {now / theirs:.2f} of XNNPACK's instructions, at most {limit:.2f}")
        # whole models in fp32 alone: in 16 bits they take long, and are made of the same layers
        for dtype, (_, (cpu, *_), most) in HALF.items():
            for name, blocks in emulate(build, plugin, sysroot, in_half(parts) | {"model": []}, dtype).items():
                now, then = kinds(blocks)["instructions"], recorded[model][name][dtype]["instructions"]
                if abs(now / then - 1) > CLOSE:
                    wrong.append(
                        f"{model} {name}, {dtype}: {now} instructions, recorded {then} ({now / then - 1:+.1%})"
                    )
            if parts["model"]:
                row = recorded[model]["whole model"]
                share = row[dtype]["cycles"][cpu] / row["ours"]["cycles"][cpu]
                if share > most:
                    wrong.append(f"{model}, {dtype}: {share:.2f} of the cycles of fp32 recorded, at most {most:.2f}")
    print(*wrong or ["instructions of all layers are as recorded"], sep="\n")
    return int(bool(wrong))


def record(build: Path, plugin: Path, sysroot: Path, peer: Path | None) -> int:
    path = RESULTS / "arm.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    before = earlier.get("models", {})
    models: dict[str, Any] = {}
    for model, parts in json.loads((HERE / "layers.json").read_text()).items():
        names = _names(parts)
        half = {dtype: emulate(build, plugin, sysroot, in_half(parts), dtype) for dtype in HALF}
        rows = {}
        theirs = regions(file) if peer and (file := peer / f"{model}.txt").exists() else []
        all_blocks = [*emulate(build, plugin, sysroot, parts).values(), *theirs]
        all_blocks += [blocks for of in half.values() for blocks in of.values()]
        counted = [kinds(b) | {"cycles": c} for b, c in zip(all_blocks, cycles(all_blocks), strict=True)]
        of_half: dict[str, dict[str, Any]] = {}
        last = iter(counted[len(names) + len(theirs) :])
        for dtype, of in half.items():
            for name, row in zip(of, last, strict=False):
                row["cycles"] = {cpu: row["cycles"][cpu] for cpu in HALF[dtype][1]}
                of_half.setdefault(name, {})[dtype] = row
        for i, name in enumerate(names):
            rows[name] = {"group": parts["layers"].get(name, {}).get("group", "model"), "ours": counted[i]}
            rows[name] |= of_half.get(name, {})
            old = before.get(model, {}).get(name, {}).get("XNNPACK")
            if theirs or old:
                rows[name]["XNNPACK"] = counted[len(names) + i] if theirs else old
        models[model] = rows
    what = {
        "kind": "emulated, counted, modelled: not timed on hardware",
        "compiler": "clang 19.1.7", "emulator": "qemu 7.2, neoverse-n1", "model": "llvm-mca 19",
        "peer": "XNNPACK of ai-edge-litert 2.1.6, cpuinfo of a Neoverse N1", "threads": 1, "dtype": "float32",
        "float16": "the same layers of ours in fp16 arithmetic",
        "bfloat16": "the same layers of ours with products of bf16; emulated: max,sve=off",
    }  # fmt: skip
    kept = {"main_loops": earlier.get("main_loops", []), "misses": earlier.get("misses", {})}
    _write(what | kept | {"models": models})
    return 0


def simulate_misses(build: Path, plugin: Path, sysroot: Path, peer: Path | None) -> int:
    found = json.loads((RESULTS / "arm.json").read_text())
    models = found.pop("models")
    layers = json.loads((HERE / "layers.json").read_text())
    misses = cache_misses.simulate(build, plugin, sysroot, layers, peer, found.get("misses", {}))
    _write(found | {"caches": cache_misses.WHAT, "misses": misses, "models": models})
    return 0


def second_opinion(build: Path, osaca: Path) -> int:
    found = json.loads((RESULTS / "arm.json").read_text())
    models = found.pop("models")
    _write(found | {"main_loops": main_loops.opinions(build, osaca), "models": models})
    return 0


def _write(found: dict[str, Any]) -> None:
    (RESULTS / "arm.json").write_text(json.dumps(found, indent=1) + "\n")
    tables = [_table(found, found["models"]), main_loops.table(found["main_loops"])]
    tables.append(cache_misses.table(found.get("misses", {})))
    (RESULTS / "arm.md").write_text("".join(tables))


def _table(what: dict[str, Any], models: dict[str, Any]) -> str:
    text = [
        "# ARM (aarch64): emulated, counted, modelled - not timed on hardware",
        "",
        "fp32, one image, one thread, channels_last in and out. Instructions: exact counts under qemu 7.2",
        f"(neoverse-n1), built by {what['compiler']}. Cycles: those of llvm-mca 19 for each executed block, times",
        "how often it ran: no cache misses, no front end, a block as a loop of its own.",
        f"Peer: {what['peer']}, the same layer. Ratios below 1 mean fewer.",
        "The last columns: modelled cycles, ours / XNNPACK's. Written by `benchmarks/arm/count.py record`.",
    ]
    for model, rows in models.items():
        columns = (
            "layer | kind | instructions (k) | of them FMA | loaded + stored (KB) | / XNNPACK: instructions | bytes"
        )
        columns += " | n1 | v1 | v2 | a55"
        text += ["", f"## {model}", "", f"| {columns} |", "|---" * 11 + "|"]
        for name, row in rows.items():
            o, p = row["ours"], row.get("XNNPACK")
            moved = (o["loaded"] + o["stored"]) / 1024
            cells = [
                name,
                row["group"],
                f"{o['instructions'] / 1e3:.0f}",
                f"{o['fma'] / o['instructions']:.0%}",
                f"{moved:.0f}",
            ]
            if p:
                cells += [f"{o['instructions'] / p['instructions']:.2f}"]
                cells += [f"{(o['loaded'] + o['stored']) / (p['loaded'] + p['stored']):.2f}"]
                cells += [f"{o['cycles'][c] / p['cycles'][c]:.2f}" for c in CPUS]
            else:
                cells += ["-"] * 6
            text.append("| " + " | ".join(cells) + " |")
        for dtype, (_, cpus, _) in HALF.items():
            lines = [_half_line(name, row, dtype) for name, row in rows.items() if dtype in row]
            if not lines:
                continue
            text += ["", f"### {model}, {dtype}", "", "Against our fp32: ratios below 1 mean fewer.", ""]
            columns = "layer | kind | instructions (k) | of them FMA | / fp32: instructions | bytes | "
            columns += " | ".join(cpu[cpu.index("-") + 1 :] for cpu in cpus)
            text += [f"| {columns} |", "|---" * (6 + len(cpus)) + "|", *lines]
    return "\n".join(text) + "\n"


def _half_line(name: str, row: dict[str, Any], dtype: str) -> str:
    h, o = row[dtype], row["ours"]
    cells = [name, row["group"], f"{h['instructions'] / 1e3:.0f}", f"{h['fma'] / h['instructions']:.0%}"]
    cells += [f"{h['instructions'] / o['instructions']:.2f}"]
    cells += [f"{(h['loaded'] + h['stored']) / (o['loaded'] + o['stored']):.2f}"]
    cells += [f"{cycles_ / o['cycles'][cpu]:.2f}" for cpu, cycles_ in h["cycles"].items()]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    build_, *rest = map(Path, paths)
    if command == "loops":
        found_ = main_loops.check(build_)
        print(*found_, sep="\n", end="\n" if found_ else "")
        sys.exit(bool(found_))
    if command == "osaca":
        sys.exit(second_opinion(build_, rest[0]))
    plugin_, sysroot_, *rest = rest
    if command == "gate":
        sys.exit(gate(build_, plugin_, sysroot_))
    if command == "misses":
        sys.exit(simulate_misses(build_, plugin_, sysroot_, rest[0] if rest else None))
    sys.exit(record(build_, plugin_, sysroot_, rest[0] if rest else None))
