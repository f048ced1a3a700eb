"""The whole of `mnv4-ops report`: what stands on the page, in order."""

from __future__ import annotations

from pathlib import Path

from mnv4_ops.bench import page_files, page_sections, roofline, roofline_plot
from mnv4_ops.bench.page import Cell, Picture, Section, Table
from mnv4_ops.spec import MODELS

TITLE = "mnv4_ops: benchmarks"
LEAD = (
    "MobileNetV4 by fused kernels, against the best of what else runs it. Every figure passed a correctness gate "
    "first; what lost stands here too. Click a heading to sort."
)
_ORDER = ("models", "pareto", "ops", "gpu", "arm")
_RIDGES = ("0", "pixel6-cpu", "100", "pixel8-edgetpu")


def build(folder: Path) -> tuple[str, str, list[Section]]:
    """(title, lead, sections) of the result files in a folder; the roofline is computed."""
    documents = page_files.load(folder)
    ordered = sorted(documents.items(), key=lambda item: _ORDER.index(str(page_files.kind_of(item[1]))))
    sections = [page_sections.summary(dict(ordered))]
    for stem, document in ordered:
        sections.append(page_sections.BUILDERS[str(page_files.kind_of(document))](stem, document))
    return TITLE, LEAD, [*sections, _roofline()]


def _roofline() -> Section:
    section = Section("roofline", "Roofline: what fusing saves at any ridge point")
    section.intro = (
        "Computed, not measured: a layer takes max(MACs, ridge point x bytes), at one byte an element as in the paper. "
        "Layer by layer every layer reads and writes memory; fused, a block does so once."
    )
    ridges = [roofline.ridge_point(text) for text in _RIDGES]
    rows = roofline.blocks("conv_medium")
    for figure, text in (
        (roofline_plot.block_bars("conv_medium 256, batch 1", rows, ridges), "Cost of each block of conv_medium"),
        (roofline_plot.sweep(roofline.generations()), "MobileNetV1 to V4 over the ridge point"),
    ):
        section.pictures.append(Picture.of(figure, text))
    table = []
    for model in MODELS:
        rows = roofline.blocks(model)
        cells = [Cell(model)]
        for _, ridge in ridges:
            whole, fused = roofline.cost(rows, ridge), roofline.cost(rows, ridge, fused=True)
            cells += [Cell.number(whole / 1e9, ".3f"), Cell.number(100 * fused / whole, ".0f", " %")]
        table.append(cells)
    columns = [part for label, _ in ridges for part in (f"{label}: G", "fused")]
    section.tables.append(Table("G MAC-equivalents, and fused as a share of that", ("model", *columns), table))
    return section
