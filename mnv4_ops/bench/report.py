"""Tables for the terminal and for Markdown, and the JSON file.

JSON: {"schema": SCHEMA, "environment": {...}, "method": {...}, "cells": [cell, ...]}; a cell is what
`cell.measure_cell` returns, with times in milliseconds per call (whole batch) and `macs` per call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from mnv4_ops.bench.cell import BASELINE, HEADLINE_PEERS, OURS

SCHEMA = "mnv4-ops/bench/1"
_SHOWN = 3  # fallbacks written out under a table
BUSY = 0.5  # involuntary context switches per timed call


def _name(cell: dict[str, Any]) -> str:
    return str(cell["model"]).split(".")[0].removeprefix("mobilenetv4_")


def title(cell: dict[str, Any]) -> str:
    shape = f"{_name(cell)} {cell['resolution']}, batch {cell['batch']}, {threads_text(cell['threads'])}"
    return f"{shape}, fp32, weights: {cell['weights']}"


def threads_text(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads != 1 else "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def cell_table(cell: dict[str, Any]) -> Table:
    """One row per variant, the best peer and mnv4_ops in bold."""
    table = Table(title=title(cell), title_justify="left", title_style="bold")
    table.add_column("variant")
    for column in ("median ms", "20 - 80 %", "GFLOP/s", "of peak", "mnv4_ops is", "max error"):
        table.add_column(column, justify="right")
    ours = cell["variants"].get(OURS, {}).get("median_ms")
    order = sorted(cell["variants"], key=lambda name: name == OURS)
    for name in order:
        facts = cell["variants"][name]
        table.add_row(
            facts["label"] + (" (best peer)" if name == cell["best_peer"] else ""),
            f"{facts['median_ms']:.3f}",
            f"{facts['q20_ms']:.3f} - {facts['q80_ms']:.3f}",
            f"{facts['gflops']:.1f}" if "gflops" in facts else "",
            _percent(facts.get("fraction_of_peak")),
            _times(facts["median_ms"] / ours) if ours and name != OURS else "",
            f"{facts['error']:.1e}",
            style="bold" if name in (OURS, cell["best_peer"]) else None,
        )
    return table


def cell_notes(cell: dict[str, Any]) -> list[str]:
    """Lines under a table: the class seen, what was left out, whether the row counts as a headline."""
    notes = []
    label = cell["top1"]["label"] or f"class {cell['top1']['index']}"
    if OURS in cell["variants"]:
        facts = cell["variants"][OURS]
        notes.append(
            f"logits agree: max|d|/max|ref| {facts['error']:.1e}, same top-1 ({label}); "
            f"enable and first forward {facts['prepare_s'] * 1e3:.0f} ms"
        )
    served = cell.get("served")
    if served:
        notes.append(f"{served['fused']} parts ran fused, {len(served['original'])} ran their original forward")
        notes += [f"  {line}" for line in served["original"][:_SHOWN]]
        if len(served["original"]) > _SHOWN:
            notes.append(f"  and {len(served['original']) - _SHOWN} more")
    if cell.get("preempted_per_call", 0) > BUSY:
        notes.append(
            f"the machine was busy: another process took a CPU {cell['preempted_per_call']:.1f} times per timed call; "
            "the figures mean little"
        )
    if cell.get("peak_gflops"):
        notes.append(f"FMA peak measured {cell['peak_gflops']:.0f} GFLOP/s")
    notes += [f"left out: {name}: {reason}" for name, reason in cell["unavailable"].items()]
    missing = [name for name in HEADLINE_PEERS if name not in cell["variants"]]
    if OURS in cell["variants"] and missing:
        notes.append(f"not a headline row: {', '.join(missing)} missing")
    return notes


_SUMMARY = (
    "model",
    "batch",
    "threads",
    "eager ms",
    "best torch ms",
    "best peer ms",
    "mnv4_ops ms",
    "vs eager",
    "vs best",
    "of peak",
)


def _summary_rows(cells: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for cell in cells:
        variants = cell["variants"]
        head = [_name(cell), str(cell["batch"]), str(cell["threads"])]
        if cell["red"]:
            rows.append([*head, "red: no speed", *[""] * 6])
            continue
        torch_best = min(f["median_ms"] for n, f in variants.items() if n.startswith("torch_"))
        best = cell["best_peer"]
        ours = variants.get(OURS)
        rows.append(
            [
                *head,
                f"{variants[BASELINE]['median_ms']:.2f}",
                f"{torch_best:.2f}",
                f"{variants[best]['median_ms']:.2f} ({best})",
                f"{ours['median_ms']:.2f}" if ours else "missing",
                _times(cell.get("speedup_vs_eager")),
                _times(cell.get("speedup_vs_best_peer")),
                _percent(ours.get("fraction_of_peak")) if ours else "",
            ]
        )
    return rows


def summary_table(cells: list[dict[str, Any]]) -> Table:
    table = Table(title="Summary", title_justify="left", title_style="bold")
    for index, column in enumerate(_SUMMARY):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in _summary_rows(cells):
        table.add_row(*row)
    return table


def markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def markdown(document: dict[str, Any]) -> str:
    """The summary and the environment of a document, for docs and README."""
    env = document["environment"]
    cpu = (env.get("cpu") or {}).get("model", "unknown CPU")
    tier = (env.get("cpu") or {}).get("tier", "none")
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    return (
        f"{cpu}, tier {tier}, {env['date'][:10]}, commit {env['commit'] or 'none'}; {packages}. "
        "Median milliseconds per call, fp32, interleaved.\n\n"
        + markdown_table(_SUMMARY, _summary_rows(document["cells"]))
    )


def document(environment: dict[str, Any], method: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": SCHEMA, "environment": environment, "method": method, "cells": cells}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
