"""Misses of simulated data caches (cache.c) in a second run of each layer, ours and XNNPACK's."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

CACHES = "l1=65536/4,l2=1048576/8"  # bytes / ways: a Neoverse N1
WHAT = (
    "simulated: 64 KiB of 4 ways and 1 MiB of 8 ways (Neoverse N1), lines of 64 bytes, LRU, no prefetcher, data alone"
)
COLUMNS = ("accesses", "l1", "l2")


def _read(path: Path) -> list[dict[str, int]]:
    return [dict(zip(COLUMNS, map(int, line.split()), strict=True)) for line in path.read_text().splitlines()]


def _ours(build: Path, plugin: Path, sysroot: Path, lines: list[str], *arguments: str) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "misses.txt"
        command = ["qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(sysroot), "-plugin", f"{plugin},out={out},{CACHES}"]
        command += [str(build / "layers"), "float32", "warm", *arguments]
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True)
        return _read(out)


def simulate(
    build: Path, plugin: Path, sysroot: Path, models: dict[str, Any], peer: Path | None, earlier: dict[str, Any]
) -> dict[str, Any]:
    """By model and layer; of XNNPACK what `peer` has, a folder of the plugin's files MODEL.txt, else as recorded."""
    found: dict[str, Any] = {}
    for model, parts in models.items():
        if not parts["model"]:
            continue
        layers = parts["layers"]
        ours = _ours(build, plugin, sysroot, [layer["line"] for layer in layers.values()])
        ours += _ours(build, plugin, sysroot, parts["model"], "model")
        names = [*layers, "whole model"]
        found[model] = {name: {"ours": row} for name, row in zip(names, ours, strict=True)}
        theirs = _read(file) if peer is not None and (file := peer / f"{model}.txt").exists() else None
        for name, row in zip(names, theirs or [None] * len(names), strict=True):
            old = earlier.get(model, {}).get(name, {}).get("XNNPACK")
            if row or old:
                found[model][name]["XNNPACK"] = row or old
    return found


def table(found: dict[str, Any]) -> str:
    if not found:
        return ""
    text = [
        "",
        "## Misses of simulated data caches, fp32",
        "",
        f"{WHAT[0].upper()}{WHAT[1:]}.",
        "Misses of the second run of a layer, with what the first has left in the caches. L1: lines from L2 or memory,",
        "L2: lines from memory. XNNPACK's with what LiteRT does around it. By `benchmarks/arm/count.py misses`.",
    ]
    for model, rows in found.items():
        text += [
            "",
            f"### {model}",
            "",
            "| layer | L1 misses (k) | XNNPACK | ratio | L2 misses (k) | XNNPACK |",
            "|---" * 6 + "|",
        ]
        for name, row in rows.items():
            o, p = row["ours"], row.get("XNNPACK")
            cells = [name, f"{o['l1'] / 1e3:.1f}"]
            cells += [f"{p['l1'] / 1e3:.1f}", f"{o['l1'] / max(p['l1'], 1):.2f}"] if p else ["-", "-"]
            cells += [f"{o['l2'] / 1e3:.1f}", f"{p['l2'] / 1e3:.1f}" if p else "-"]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"
