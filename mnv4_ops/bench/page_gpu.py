"""The section of the report about a GPU: whole models on both clocks, memory, single blocks, attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mnv4_ops.bench import gpu, gpu_mqa, inputs, page_plots, rows
from mnv4_ops.bench.page import Cell, Picture, Section, Table
from mnv4_ops.bench.page_files import Document, section_of

_MIB = 2**20
_KINDS: tuple[tuple[str, str, dict[str, str], dict[str, str]], ...] = (
    ("graphs", "CUDA graph against CUDA graph, device ms", gpu.GRAPHS, {gpu.OURS: "vs best peer"}),
    ("calls", "Calls, host ms", gpu.CALLS, {gpu.OURS: "enable() vs best", gpu.OURS_GRAPHS: "cuda_graphs vs best"}),
)


def needed(found: Document) -> tuple[str, ...]:
    """The peers that a cell has to be quoted against. Of the hybrids that is the form with expanded keys and values:
    SDPA has fused kernels for that one alone.
    """
    hybrid = inputs.ledger_name(found["model"]).startswith("hybrid")
    return rows.HEADLINE_MQA["cuda"] if hybrid else rows.HEADLINE["cuda"]


def headline(found: Document) -> bool:
    """Whether ours and the peers that a cell has to be quoted against ran in it."""
    return gpu.OURS in found["graphs"] and set(needed(found)) <= set(found["graphs"])


def section(stem: str, document: Document) -> Section:
    """Everything that a result file of a GPU holds."""
    made = section_of(
        stem,
        document,
        "On a GPU",
        "Two clocks. Graphs: every variant captured into a CUDA graph, replays timed by the device. Calls: host wall "
        "clock with a synchronise after each call. Outputs pass the 2x rule against float64 first.",
    )
    good = [found for found in document.get("cells", []) if not found.get("red")]
    red = [found for found in document.get("cells", []) if found.get("red")]
    for kind, caption, labels, versus in _KINDS:
        if any(found[kind] for found in good):
            made.tables.append(_models(good, kind, caption, labels, versus))
    timed = [found for found in good if gpu.OURS in _medians(found, "graphs")]
    if timed:
        names = [f"{_name(found)}, b{found['batch']}, {found['dtype']}" for found in timed]
        times = [_medians(found, "graphs") for found in timed]
        figure = page_plots.speedups("CUDA graph against CUDA graph", names, times, gpu.GRAPHS)
        made.pictures.append(Picture.of(figure, f"Models on a GPU, {stem}: time over that of mnv4_ops"))
    for table in (_memory(good), _attention(document.get("mqa", [])), _blocks(document.get("blocks", []))):
        if table.rows:
            made.tables.append(table)
    made.notes = [f"red, no speed: {_name(found)}, batch {found['batch']}: {found['red']}" for found in red]
    made.notes += [f"not measured: {text}" for text in document.get("not_measured", [])]
    missing: dict[str, dict[str, None]] = {}
    for found in good:
        for name in (*needed(found), gpu.OURS):
            if name not in found["graphs"]:
                missing.setdefault(gpu.GRAPHS[name], {})[_name(found)] = None
    made.notes += [f"* no headline: {label} is missing in {', '.join(models)}" for label, models in missing.items()]
    return made


def _name(found: Document) -> str:
    return f"{inputs.ledger_name(found['model'])} {found['resolution']}"


def _medians(found: Document, kind: str, key: str = "median_ms") -> dict[str, float]:
    return {name: facts[key] for name, facts in found[kind].items() if key in facts}


def _models(good: Sequence[Document], kind: str, caption: str, labels: dict[str, str], versus: dict[str, str]) -> Table:
    seen = [name for name in labels if any(name in _medians(found, kind) for found in good)]
    # with the L2 flushed before each replay
    cold = [name for name in labels if any(name in _medians(found, kind, "cold_median_ms") for found in good)]
    table = []
    for found in good:
        warm, flushed = _medians(found, kind), _medians(found, kind, "cold_median_ms")
        ratios = (found[kind].get(name, {}).get("speedup_vs_best_peer") for name in versus)
        table.append(
            [
                Cell(_name(found)),
                Cell(found["dtype"]),
                Cell.number(found["batch"], "d"),
                *(Cell.number(warm.get(name), ".3f") for name in seen),
                *(Cell.against_best(ratio, headline(found)) for ratio in ratios),
                *(Cell.number(flushed.get(name), ".3f") for name in cold),
            ]
        )
    columns = [*(labels[name] for name in seen), *versus.values(), *(f"{labels[name]}, cold L2" for name in cold)]
    return Table(caption, ("model", "dtype", "batch", *columns), table)


def _memory(good: Sequence[Document]) -> Table:
    table = []
    for found in good:
        memory = found.get("memory") or {}
        if gpu.OURS in memory and memory.get("eager_cl"):
            eager, ours = memory["eager_cl"], memory[gpu.OURS]
            head = [Cell(_name(found)), Cell(found["dtype"]), Cell.number(found["batch"], "d")]
            sizes = [Cell.number(eager / _MIB, ".0f"), Cell.number(ours / _MIB, ".0f")]
            table.append([*head, *sizes, Cell.number(ours / eager, ".2f")])
    columns = ("model", "dtype", "batch", "eager channels_last MiB", "mnv4_ops MiB", "mnv4_ops over eager")
    return Table("Peak memory of a forward without the model's own weights", columns, table)


def _attention(found: Sequence[Document]) -> Table:
    labels = {**gpu_mqa.PEERS, gpu_mqa.OURS: "mnv4_ops"}
    seen = [name for name in labels if any(name in row["us"] for row in found)]
    table = [
        [
            Cell(row["block"]),
            Cell(str(row["dtype"]).removeprefix("torch.")),
            Cell.number(row["batch"], "d"),
            *(Cell.number(row["us"].get(name), ".1f") for name in seen),
            Cell.ratio(row.get("speedup")),
        ]
        for row in found
    ]
    columns = ("block", "dtype", "batch", *(labels[name] for name in seen), "vs best peer")
    return Table("Mobile MQA blocks, CUDA graph against CUDA graph, us", columns, table)


def _short(block: str) -> str:
    """The key of a kernel table without what is the same everywhere: activations that are none, symmetric padding."""
    parts = block.replace(" symmetric", "").replace("none-", "").replace("-none", "")
    return re.sub(r" none\b", "", parts)


def _blocks(found: Sequence[Document]) -> Table:
    """One row per block, one column per batch size."""
    batches = sorted({row["batch"] for row in found})
    micros: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in found:
        key = (row["model"], row["block"], row["height"], row["width"], row["times_in_model"])
        micros.setdefault(key, {})[row["batch"]] = row["us"]
    table = [
        [
            Cell(f"{model} {_short(block)}"),
            Cell(f"{height} x {width}", float(height * width)),
            Cell.number(times, "d"),
            *(Cell.number(by_batch.get(batch), ".1f") for batch in batches),
        ]
        for (model, block, height, width, times), by_batch in micros.items()
    ]
    columns = ("block", "input", "times in the model", *(f"batch {batch}" for batch in batches))
    return Table("Convolution blocks of mnv4_ops, us in a CUDA graph", columns, table)
