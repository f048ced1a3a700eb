"""From committed result files to the sections of the report. What is about a GPU stands in `page_gpu`."""

from __future__ import annotations

from collections.abc import Callable

from mnv4_ops.bench import cell, gpu, inputs, op_run, page_gpu, page_plots, pareto, report
from mnv4_ops.bench import ops as op_registry
from mnv4_ops.bench.op_run import geomean
from mnv4_ops.bench.page import Cell, Picture, Section, Table
from mnv4_ops.bench.page_files import LABELS, Document, kind_of, machine_of, section_of


def models(stem: str, document: Document) -> Section:
    """Whole models on a CPU."""
    section = section_of(
        stem,
        document,
        "Whole models on a CPU",
        "Median milliseconds per call on a real photograph, fp32, every variant interleaved in one process pinned to "
        "as many CPUs as threads. The best peer is the fastest of all that are installed and give the same answer.",
    )
    good = [found for found in document["cells"] if not found["red"]]
    names, times, table = [], [], []
    for found in document["cells"]:
        if found["red"]:
            table.append([*_which(found), Cell("red: no speed", None, "bad"), *[Cell("")] * 9])
            continue
        variants = found["variants"]
        name = f"{inputs.ledger_name(found['model'])} {found['resolution']}, b{found['batch']}, {found['threads']}t"
        medians = {key: facts["median_ms"] for key, facts in variants.items()}
        if cell.OURS in medians:
            names.append(name)
            times.append(medians)
        ours, best = variants.get(cell.OURS, {}), found["best_peer"]
        peak = ours.get("fraction_of_peak")
        table.append(
            [
                *_which(found),
                *(Cell.number(medians.get(peer), ".2f") for peer in (cell.BASELINE, *cell.HEADLINE_PEERS)),
                Cell.number(ours.get("median_ms"), ".2f"),
                Cell(f"{ours['q20_ms']:.2f} - {ours['q80_ms']:.2f}" if ours else ""),
                Cell.ratio(found.get("speedup_vs_eager")),
                Cell(LABELS.get(best, best)),
                Cell.against_best(found.get("speedup_vs_best_peer"), found["headline"]),
                Cell.number(None if peak is None else 100 * peak, ".0f", " %"),
            ]
        )
    columns = (*_WHICH, "torch eager ms", *(f"{LABELS[name]} ms" for name in cell.HEADLINE_PEERS), "mnv4_ops ms",
               "20 - 80 %", "vs eager", "best peer", "vs best", "of FMA peak")  # fmt: skip
    section.tables.append(Table("All cells", columns, table))
    if names:
        figure = page_plots.speedups("Whole models against every variant measured", names, times, LABELS)
        section.pictures.append(
            Picture.of(figure, f"Whole models, {stem}: time of every variant over that of mnv4_ops")
        )
        section.tables.append(_every_variant(good))
    section.notes = [
        f"red, no speed: {report.title(found)}: {found['red']}" for found in document["cells"] if found["red"]
    ]
    section.notes += _left_out(good) + _stars(good)
    return section


_WHICH = ("model", "batch", "threads")


def _which(found: Document) -> list[Cell]:
    name = f"{inputs.ledger_name(found['model'])} {found['resolution']}"
    return [Cell(name), Cell.number(found["batch"], "d"), Cell.number(found["threads"], "d")]


def _every_variant(good: list[Document]) -> Table:
    """Milliseconds of all that was measured; what had no turn in a cell has none."""
    have = {name for found in good for name in found["variants"]}
    # what it is about first: a wide table is cut off at the right
    names = [name for name in dict.fromkeys((cell.OURS, *cell.HEADLINE_PEERS, *LABELS)) if name in have]
    table = []
    for found in good:
        medians = (found["variants"].get(name, {}).get("median_ms") for name in names)
        table.append([*_which(found), *(Cell.number(ms, ".2f") for ms in medians)])
    return Table("Every variant, median ms", (*_WHICH, *(LABELS.get(name, name) for name in names)), table)


def ops(stem: str, document: Document) -> Section:
    """Single ops, or the blocks of models on a GPU."""
    what = "Blocks on a GPU" if document.get("blocks") else "Single ops"
    section = section_of(
        stem,
        document,
        what,
        "Microseconds per call. The limit is the larger of the multiply-accumulates at the measured FMA peak (on a "
        "GPU: rate of a matrix product) and the bytes of input, weights and output at the measured bandwidth of the "
        "memory that holds them.",
    )
    names, ratios = op_run.against_peers(document, LABELS)
    if ratios:
        section.tables.append(Table(op_run.AGAINST_PEERS, names, ratios))
    for label, found in op_run.groups(document):
        table = [op_run.cells(row, LABELS) for row in found]
        section.tables.append(Table(label, op_run.columns(found), table))
    labels = {op.name: op.label for op in op_registry.OPS}
    good = [row for row in document["rows"] if row["red"] is None]
    if good:
        figure = page_plots.ops("Every case of every op", good, labels)
        section.pictures.append(Picture.of(figure, f"{what}, {stem}: ratio to the best peer, fraction of the limit"))
    section.notes = op_run.notes(document)
    return section


def arm(stem: str, document: Document) -> Section:
    """Counts and models of an emulated ARM."""
    section = Section(stem, "ARM: emulated, counted, modelled; not timed on hardware")
    section.intro = (
        "Instructions are exact counts under an emulator, cycles those of a model of each core, of our layers over "
        "XNNPACK's for the same layers. No time of an emulator appears anywhere."
    )
    for model, layers in document["models"].items():
        cores = list(next(iter(layers.values()))["ours"]["cycles"])
        table = []
        for name, both in layers.items():
            ours, theirs = both["ours"], both.get("XNNPACK")
            if theirs is None:
                continue
            counts = [theirs["instructions"] / ours["instructions"]]
            counts += [theirs["cycles"][core] / ours["cycles"][core] for core in cores]
            table.append([Cell(name), Cell(both["group"]), *(Cell.ratio(ratio) for ratio in counts)])
        section.tables.append(Table(f"{model}: XNNPACK's over ours", ("layer", "kind", "instructions", *cores), table))
    keys = ("compiler", "emulator", "model", "peer", "dtype", "threads")
    section.details = {key: str(document[key]) for key in keys if key in document}
    return section


def front(stem: str, document: Document) -> Section:
    """Accuracy against latency."""
    section = section_of(
        stem,
        document,
        "Accuracy against latency",
        "Published ImageNet top-1 (timm's checkpoints at the resolution named) against the latency measured here: the "
        "better of torch's two memory formats before enable(), and the same model after it.",
    )
    points = document["points"]
    columns = (
        "model",
        "family",
        "timm top-1 %",
        "paper top-1 %",
        "resolution",
        "before ms",
        "after ms",
        "speed-up",
        "on the front",
    )
    best = pareto.front(points)
    table = [
        [
            Cell(point["model"]),
            Cell(point["family"]),
            Cell.number(point["top1"], ".2f"),
            Cell.number(point.get("paper_top1"), ".1f"),
            Cell.number(point["resolution"], "d"),
            Cell.number(point["before_ms"], ".2f"),
            Cell.number(point.get("after_ms"), ".2f"),
            Cell.ratio(point["before_ms"] / point["after_ms"] if point.get("after_ms") else None),
            Cell("yes" if point["model"] in best else ""),
        ]
        for point in points
    ]
    section.tables.append(Table("Models", columns, table))
    title = f"Batch 1, {report.threads_text(document['threads'])}, fp32"
    section.pictures.append(Picture.of(page_plots.pareto(title, points), f"Pareto front, {stem}"))
    sources = sorted({point["source"] for point in points})
    section.notes = [f"accuracy: {source}" for source in sources]
    return section


BUILDERS: dict[str, Callable[[str, Document], Section]] = {
    "models": models,
    "ops": ops,
    "gpu": page_gpu.section,
    "pareto": front,
    "arm": arm,
}


def summary(documents: dict[str, Document]) -> Section:
    """One line per file: geometric mean and range of the ratio to the best peer."""
    section = Section("summary", "In short")
    section.intro = "The time of the best available peer over that of mnv4_ops; above 1 mnv4_ops is faster."
    table = []
    for document in documents.values():
        kind = kind_of(document)
        groups: list[tuple[str, list[float]]] = []
        if kind == "models":
            cells = [c for c in document["cells"] if not c["red"] and c.get("headline")]
            groups = [("whole models", [c["speedup_vs_best_peer"] for c in cells])]
        elif kind == "ops":
            groups = [
                (label, [row["vs_best_peer"] for row in found if row["headline"] and row["red"] is None])
                for label, found in op_run.settings(document)
            ]
        elif kind == "gpu":
            cells = [c for c in document.get("cells", []) if not c.get("red") and page_gpu.headline(c)]
            ratios = [c["graphs"][gpu.OURS]["speedup_vs_best_peer"] for c in cells]
            blocks = [row["speedup"] for row in document.get("mqa", []) if "speedup" in row]
            groups = [("whole models, CUDA graphs", ratios), ("Mobile MQA blocks, CUDA graphs", blocks)]
        for label, ratios in groups:
            if ratios:
                won = sum(ratio >= 1 for ratio in ratios)
                head = [Cell(label), Cell(machine_of(document)), Cell.number(len(ratios), "d")]
                spread = [Cell.ratio(value) for value in (geomean(ratios), min(ratios), max(ratios))]
                table.append([*head, *spread, Cell(f"{won} of {len(ratios)}", won / len(ratios))])
    columns = ("what", "machine", "rows", "geometric mean", "worst", "best", "rows >= 1")
    section.tables.append(Table("Headline rows only: those quoted against every main peer", columns, table))
    return section


def _left_out(cells: list[Document]) -> list[str]:
    reasons = {(name, reason) for found in cells for name, reason in found["unavailable"].items()}
    return [f"left out: {LABELS.get(name, name)}: {reason}" for name, reason in sorted(reasons)]


def _stars(cells: list[Document]) -> list[str]:
    if all(found["headline"] for found in cells):
        return []
    return ["* no headline: one of the peers that it has to be quoted against is missing"]
