"""Figures of the roofline: blocks against ridge points, the model as a curve, and the generations of MobileNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mnv4_ops.bench import plots
from mnv4_ops.bench.layers import KINDS
from mnv4_ops.bench.roofline import (
    FITTED,
    GENERATIONS,
    HIGH,
    ONE,
    Block,
    Scale,
    SweptModel,
    cost,
    layer_cost,
    relative_to_best,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND_LABELS = {
    "conv": "dense k x k",
    "pointwise": "1x1",
    "depthwise": "depthwise",
    "attention": "attention",
    "fc": "1x1 on one pixel, classifier",
}
_RIDGES = np.concatenate([np.linspace(0, 100, 101), np.linspace(104, HIGH, 100)])


def _mark_fitted(axes: Any, *, text: bool) -> None:
    for index, (name, value) in enumerate(FITTED.items()):
        axes.axvline(value, color="#999999", linewidth=0.8, linestyle=":")
        if text:
            # two pairs of neighbours: each on its own side of the line
            side = "right" if index % 2 == 0 else "left"
            axes.annotate(
                f" {name} ", (value, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha=side,
                fontsize=7, color="#666666",
            )  # fmt: skip


@plots.styled
def block_bars(title: str, rows: Sequence[Block], ridges: Sequence[tuple[str, float]], scale: Scale = ONE) -> Figure:
    """The paper's op costs: a chart per ridge point, blocks in order; layers stacked, the fused cost marked."""
    wide = max(7.0, 0.42 * len(rows) + 1.5)
    made, grid = plots.figure(len(ridges), 1, size=(wide, 1.0 + 2.1 * len(ridges)), sharex=True)
    places = np.arange(len(rows))
    present = [kind for kind in KINDS if any(layer.kind == kind for row in rows for layer in row.layers)]
    for (label, ridge), (axes,) in zip(ridges, grid, strict=True):
        bottom = np.zeros(len(rows))
        for kind in present:
            part = np.array(
                [sum(layer_cost(x, ridge, scale=scale) for x in row.layers if x.kind == kind) / 1e6 for row in rows]
            )
            colour = plots.COLOURS[KINDS.index(kind)]
            axes.bar(places, part, 0.78, bottom, color=colour, label=_KIND_LABELS[kind])
            bottom += part
        fused = [row.cost(ridge, fused=True, scale=scale) / 1e6 for row in rows]
        bound = [row.bound(ridge, fused=True, scale=scale) == "memory" for row in rows]
        axes.scatter(
            places, fused, marker="_", s=120, linewidths=2.2, color=["#b00020" if m else "black" for m in bound],
            zorder=3,
        )  # fmt: skip
        share = 100 * sum(fused) / bottom.sum()
        axes.set_title(f"ridge point {label} MACs/byte: {bottom.sum() / 1e3:.3f} G, fused {share:.0f} %", fontsize=9)
        axes.set_ylabel("M MAC-equivalents")
        axes.margins(x=0.01, y=0.08)
        axes.grid(visible=False, axis="x")
    last = grid[-1, 0]
    last.set_xticks(places, [f"{row.name} {row.kind}" for row in rows], rotation=90, fontsize=7)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    from matplotlib.lines import Line2D

    for colour, text in (("black", "fused, compute-bound"), ("#b00020", "fused, memory-bound")):
        handles.append(Line2D([], [], color=colour, marker="_", linestyle="", markersize=11, markeredgewidth=2.2))
        labels.append(text)
    made.suptitle(title, x=0.01, ha="left", fontweight="bold")
    made.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return made


@plots.styled
def model_curve(title: str, rows: Sequence[Block], scale: Scale = ONE) -> Figure:
    """Left: cost of the model over the ridge point, unfused and fused. Right: MACs per byte of each block."""
    made, ((left, right),) = plots.figure(1, 2, size=(11, 0.6 + max(3.8, 0.19 * len(rows))), width_ratios=(1.1, 1))
    for fused, colour in ((False, plots.COLOURS[0]), (True, plots.COLOURS[2])):
        values = [cost(rows, ridge, fused=fused, scale=scale) / 1e9 for ridge in _RIDGES]
        left.plot(_RIDGES, values, color=colour, label="fused blocks" if fused else "layer by layer")
    macs = cost(rows, 0, scale=scale) / 1e9
    left.axhline(macs, color="#666666", linewidth=0.8, linestyle="--", label="MACs alone")
    left.set(xlabel="ridge point, MACs/byte", ylabel="G MAC-equivalents", xlim=(0, HIGH), ylim=(0, None))
    left.set_title("whole model")
    _mark_fitted(left, text=True)
    left.legend(loc="lower right")
    places = np.arange(len(rows))[::-1]
    unfused = np.array([row.intensity(fused=False, scale=scale) for row in rows])
    fused_values = np.array([row.intensity(fused=True, scale=scale) for row in rows])
    right.hlines(places, unfused, fused_values, color="#bbbbbb", linewidth=2)
    right.scatter(unfused, places, color=plots.COLOURS[0], s=22, label="layer by layer", zorder=3)
    right.scatter(fused_values, places, color=plots.COLOURS[2], s=22, label="fused", zorder=3)
    right.set_yticks(places, [f"{row.name} {row.kind}" for row in rows], fontsize=7)
    right.set_xscale("log")
    plots.plain_log(right.xaxis)
    right.set_xlabel("MACs per byte: left of a ridge point is memory-bound there")
    right.set_title("blocks")
    _mark_fitted(right, text=False)
    right.legend(loc="lower left")
    made.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return made


@plots.styled
def sweep(models: Sequence[SweptModel]) -> Figure:
    """Top: cost relative to the cheapest model that is at least as accurate. Below: accuracy against cost."""
    colours = dict(
        zip(GENERATIONS, (plots.COLOURS[7], plots.COLOURS[1], plots.COLOURS[2], plots.COLOURS[0]), strict=True)
    )
    points = (0.0, FITTED["pixel6-cpu"], 100.0, FITTED["pixel8-edgetpu"])
    made = plots.empty(size=(11, 7.6))
    grid = made.add_gridspec(2, len(points), height_ratios=(1.15, 1))
    top = made.add_subplot(grid[0, :])
    relative = {ridge: relative_to_best(models, ridge) for ridge in _RIDGES}
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    seen: dict[str, int] = {}
    for model in models:
        index = seen[model.family] = seen.get(model.family, -1) + 1
        v4 = model.family == "MobileNetV4"
        top.plot(
            _RIDGES, [relative[ridge][model.name] for ridge in _RIDGES], color=colours[model.family],
            linestyle=styles[index % len(styles)], linewidth=2.4 if v4 else 1.4, zorder=3 if v4 else 2,
            label=f"{model.name} ({model.top1:.1f} %)",
        )  # fmt: skip
    _mark_fitted(top, text=True)
    top.set(xlim=(0, HIGH), ylim=(0.95, None), xlabel="ridge point, MACs/byte", ylabel="cost / best as accurate")
    top.set_title(
        "cost relative to the cheapest model that is at least as accurate (1 = on the Pareto front)", fontsize=9
    )
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    share = None
    for column, ridge in enumerate(points):
        axes = made.add_subplot(grid[1, column], sharey=share)
        share = share or axes
        for family, colour in colours.items():
            own = sorted((m for m in models if m.family == family), key=lambda m: m.cost(ridge))
            values = [m.cost(ridge) / 1e9 for m in own]
            line = "-" if family == "MobileNetV4" else ":"
            axes.plot(values, [m.top1 for m in own], line, marker="o", markersize=4, color=colour, label=family)
        axes.set_xscale("log")
        plots.plain_log(axes.xaxis)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"ridge point {ridge:g}", fontsize=9)
        axes.set_xlabel("G MAC-equivalents")
        if column == 0:
            axes.set_ylabel("published top-1, %")
            axes.legend(fontsize=7, loc="lower right")
    return made
