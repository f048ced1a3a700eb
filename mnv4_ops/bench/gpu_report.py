"""Tables, Markdown and JSON of `mnv4-ops bench --device cuda`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mnv4_ops.bench import inputs, report
from mnv4_ops.bench.gpu import CALLS, GRAPHS, OURS, OURS_GRAPHS

SCHEMA = "mnv4-ops/gpu-bench/1"
_MIB = 2**20


def title(cell: dict[str, Any]) -> str:
    return f"{inputs.ledger_name(cell['model'])} {cell['resolution']}, batch {cell['batch']}, {cell['dtype']}"


def _ms(facts: dict[str, Any] | None) -> str:
    return f"{facts['median_ms']:.3f}" if facts and "median_ms" in facts else ""


def cell_table(cell: dict[str, Any]) -> Table:
    table = Table(title=title(cell), title_justify="left", title_style="bold")
    for index, column in enumerate(("", "clock", "ms", "20 %", "80 %", "vs ours", "of allowed error")):
        table.add_column(column, justify="left" if index < 2 else "right")
    for kind, clock in (("graphs", "device, graph"), ("calls", "host, call")):
        rows = cell[kind]
        ours = rows.get(OURS, {}).get("median_ms")
        for name, facts in sorted(rows.items(), key=lambda item: item[1].get("median_ms", 0.0)):
            if "median_ms" not in facts:
                continue
            table.add_row(
                facts["label"],
                clock,
                _ms(facts),
                f"{facts['q20_ms']:.3f}",
                f"{facts['q80_ms']:.3f}",
                f"{facts['median_ms'] / ours:.2f}x" if ours else "",
                f"{facts['of_allowed']:.2f}",
                style="bold" if name.startswith(OURS) else None,
            )
    return table


def cell_notes(cell: dict[str, Any]) -> list[str]:
    """Lines under a table."""
    notes = [f"weights {cell['weights']}, input {cell['input']}"]
    if "served" in cell:
        original = cell["served"]["original"]
        notes.append(f"{cell['served']['fused']} parts ran fused, {len(original)} ran their original forward")
        notes += [f"  {line}" for line in original[:3]]
    facts = cell["graphs"].get(OURS)
    if facts:
        notes.append(
            f"top-1 like float64: {facts['top1']:.0%} of the images (eager {facts['eager_top1']:.0%}); "
            f"first forward and capture {facts['prepare_s']:.1f} s"
        )
    if cell["memory"]:
        eager, ours = cell["memory"]["eager_cl"] / _MIB, cell["memory"][OURS] / _MIB
        notes.append(f"peak memory without weights: {ours:.1f} MiB, eager {eager:.1f} MiB ({ours / eager:.2f}x)")
    notes += [f"left out: {name}: {reason}" for name, reason in cell["unavailable"].items()]
    return notes


def _rows(cells: list[dict[str, Any]], kind: str, names: tuple[str, ...], ours: tuple[str, ...]) -> list[list[str]]:
    rows = []
    for cell in cells:
        head = [f"{inputs.ledger_name(cell['model'])} {cell['resolution']}", cell["dtype"], str(cell["batch"])]
        if cell["red"]:
            rows.append([*head, "red: no speed", *[""] * (len(names) + len(ours) - 1)])
            continue
        facts = cell[kind]
        row = [*head, *(_ms(facts.get(name)) for name in names)]
        for name in ours:
            ratio = facts.get(name, {}).get("speedup_vs_best_peer")
            row.append("" if ratio is None else f"{ratio:.2f}x")
        rows.append(row)
    return rows


def tables(cells: list[dict[str, Any]]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(heading, columns, rows) of the summary."""
    head = ("model", "dtype", "batch")
    graphs = (*head, *GRAPHS.values(), "vs best peer")
    calls = (*head, *CALLS.values(), "enable() vs best peer", "with cuda_graphs vs best peer")
    memory = (*head, "eager channels_last MiB", "mnv4_ops MiB", "ratio")
    memory_rows = [
        [
            f"{inputs.ledger_name(cell['model'])} {cell['resolution']}",
            cell["dtype"],
            str(cell["batch"]),
            f"{cell['memory']['eager_cl'] / _MIB:.1f}",
            f"{cell['memory'][OURS] / _MIB:.1f}",
            f"{cell['memory_ratio']:.2f}x",
        ]
        for cell in cells
        if cell.get("memory_ratio")
    ]
    return [
        ("CUDA graph against CUDA graph, device ms by events", graphs, _rows(cells, "graphs", tuple(GRAPHS), (OURS,))),
        (
            "Calls, host wall clock ms with a synchronise",
            calls,
            _rows(cells, "calls", tuple(CALLS), (OURS, OURS_GRAPHS)),
        ),
        ("Peak memory of a forward, without the model's weights", memory, memory_rows),
    ]


def summary(cells: list[dict[str, Any]]) -> list[Table]:
    views = []
    for heading, columns, rows in tables(cells):
        view = Table(title=heading, title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            view.add_column(column, justify="left" if index < 2 else "right")
        for row in rows:
            view.add_row(*row)
        views.append(view)
    return views


def markdown(document: dict[str, Any]) -> str:
    """Summary and environment, for docs and README."""
    env = document["environment"]
    gpu = env["gpu"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    weights = ", ".join(sorted({cell["weights"] for cell in document["cells"]}))
    text = (
        f"{gpu['name']}, {env['date'][:10]}, commit {env['commit'] or 'none'}; {packages}. Weights: {weights}. "
        "Median milliseconds, all variants interleaved in one process.\n"
    )
    for heading, columns, rows in tables(document["cells"]):
        text += f"\n### {heading}\n\n{report.markdown_table(columns, rows)}"
    return text


def document(environment: dict[str, Any], method: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": SCHEMA, "environment": environment, "method": method, "cells": cells}
