"""Figures of measured results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mnv4_ops.bench import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OURS = "mnv4_ops"
# their number and that of the colours have no common divisor: no two of many variants look alike
_MARKERS = "osD^vPX*<>h"


@plots.styled
def speedups(
    title: str, rows: Sequence[str], times: Sequence[Mapping[str, float]], labels: Mapping[str, str]
) -> Figure:
    """Per row the time of each variant over ours, on a logarithmic axis: right of 1 we are faster.

    `times` are milliseconds by name of the variant, ours included; `labels` their names for people.
    """
    names = [name for name in dict.fromkeys(name for row in times for name in row) if name != _OURS]
    made, ((axes,),) = plots.figure(size=(10, 1.2 + 0.3 * len(rows)))
    places = np.arange(len(rows))[::-1]
    for index, name in enumerate(names):
        look = {"color": plots.COLOURS[index % len(plots.COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        known = [(place, row[name] / row[_OURS]) for place, row in zip(places, times, strict=True) if name in row]
        axes.scatter(
            [ratio for _, ratio in known], [place for place, _ in known], s=34, zorder=3,
            label=labels.get(name, name), **look,
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=1.2)
    axes.set_yticks(places, rows)
    axes.set_xscale("log")
    plots.plain_log(axes.xaxis, ratios=True)
    axes.set_xlabel("time / time of mnv4_ops (right of 1: mnv4_ops is faster)")
    axes.set_title(title)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return made


@plots.styled
def ops(title: str, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """Every row of the op tables as a point: left the ratio to the best peer, right the fraction of the limit."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    made, ((left, right),) = plots.figure(1, 2, size=(11, 1.4 + 0.42 * len(names)), sharey=True)
    threads = sorted({row["threads"] for row in rows})
    for axes, key in ((left, "vs_best_peer"), (right, "of_limit")):
        for index, count in enumerate(threads):
            x, y = [], []
            for row in rows:
                value = row.get(key) if key == "vs_best_peer" else row["variants"].get(_OURS, {}).get(key)
                if value and row["threads"] == count:
                    x.append(value if key == "vs_best_peer" else 100 * value)
                    y.append(len(names) - 1 - names.index(row["op"]) + 0.16 * (index - (len(threads) - 1) / 2))
            text = f"{count} thread" + ("s" if count > 1 else "")
            axes.scatter(x, y, s=18, alpha=0.7, color=plots.COLOURS[index], label=text, zorder=3)
    left.axvline(1, color="black", linewidth=1.2)
    left.set_xscale("log")
    plots.plain_log(left.xaxis, ratios=True)
    left.set_xlabel("time of the best peer / ours")
    right.set_xlabel("% of the measured limit")
    right.set_xlim(0, None)
    left.set_yticks(range(len(names))[::-1], [labels.get(name, name) for name in names])
    left.set_title(title)
    right.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(threads))
    return made


def _name(axes: Any, spots: Mapping[str, tuple[float, float]], marks: Sequence[tuple[float, float]]) -> None:
    """Writes each name beside its spot, of several places where it hides least of the other names and of the marks."""
    size, scale = 7.0, axes.figure.dpi / 72
    taken = []
    for x, y in (axes.transData.transform(spot) / scale for spot in (*spots.values(), *marks)):
        taken.append((x - 3, y - 3, x + 3, y + 3))
    for name, spot in sorted(spots.items(), key=lambda item: item[1]):
        x, y = axes.transData.transform(spot) / scale
        width, best = 0.58 * size * len(name), None
        for dy in (5, -11, -3, 15, -21, 25, -31):
            for side in (-1, 1):
                left = x - 6 - width if side < 0 else x + 6
                box = (left, y + dy, left + width, y + dy + size)
                hidden = sum(
                    max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
                    * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
                    for other in taken
                )
                if best is None or hidden + 0.2 * abs(dy) < best[0]:
                    best = (hidden + 0.2 * abs(dy), 6 * side, dy, box)
        assert best is not None
        taken.append(best[3])
        place = {"ha": "right" if best[1] < 0 else "left", "va": "bottom", "textcoords": "offset points"}
        axes.annotate(name, spot, xytext=best[1:3], fontsize=size, **place)


@plots.styled
def pareto(title: str, points: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against latency; MobileNetV4 before and after `enable()` joined by an arrow.

    A point has `model`, `family`, `top1` and `before_ms`, MobileNetV4 also `after_ms`.
    """
    made, ((axes,),) = plots.figure(size=(10, 6))
    families = list(dict.fromkeys(point["family"] for point in points))
    for index, family in enumerate(families):
        own = sorted((p for p in points if p["family"] == family), key=lambda p: p["before_ms"])
        colour = plots.COLOURS[index % len(plots.COLOURS)]
        after = [p for p in own if p.get("after_ms")]
        label = f"{family}, before enable()" if after else family
        style = {"color": colour, "marker": "o", "markersize": 5}
        axes.plot([p["before_ms"] for p in own], [p["top1"] for p in own], ":", label=label, **style)
        if after:
            label = f"{family}, after enable()"
            line = {"linewidth": 2.2} | style
            axes.plot([p["after_ms"] for p in after], [p["top1"] for p in after], "-", label=label, **line)
        for p in own:
            arrow = {"arrowstyle": "->", "color": colour, "alpha": 0.5}
            if p.get("after_ms"):
                axes.annotate("", (p["after_ms"], p["top1"]), (p["before_ms"], p["top1"]), arrowprops=arrow)
    axes.set_xscale("log")
    plots.plain_log(axes.xaxis)
    axes.set(xlabel="median ms per image", ylabel="published ImageNet top-1, %")
    axes.margins(x=0.12, y=0.08)
    spots = {p["model"]: (p.get("after_ms") or p["before_ms"], p["top1"]) for p in points}
    _name(axes, spots, [(p["before_ms"], p["top1"]) for p in points])
    axes.set_title(title)
    axes.legend(loc="lower right", fontsize=8)
    return made
