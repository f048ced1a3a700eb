"""Figures: one style, PNG and SVG, without pyplot (no display, no global state)."""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from mnv4_ops.bench.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_P = ParamSpec("_P")

FORMATS = ("png", "svg")
# Okabe and Ito's palette, told apart with any colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    # SVG text stays text, and its ids are the same on every run
    "svg.fonttype": "none",
    "svg.hashsalt": "mnv4_ops",
}


def require() -> None:
    """Raises BenchError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("figures need matplotlib, which is not installed: pip install 'mnv4-ops[bench]'")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorator of a function that makes a figure: it draws in the style of this file."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        require()
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def empty(*, size: tuple[float, float]) -> Figure:
    """A figure without axes; `size` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its 2-d array of axes; `size` in inches."""
    made = empty(size=size)
    return made, made.subplots(rows, columns, squeeze=False, **options)


def plain_log(axis: Any, *, ratios: bool = False) -> None:
    """A logarithmic axis with plain numbers on few ticks; for `ratios`, which lie around 1, more of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    parts = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if ratios else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=parts, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def render(made: Figure, kind: str) -> bytes:
    """The figure as a file of one of `FORMATS`; the same bytes on every run."""
    import matplotlib

    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        made.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def save(made: Figure, folder: Path, name: str) -> list[Path]:
    """Writes `name`.png and `name`.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in FORMATS:
        file = folder / f"{name}.{kind}"
        file.write_bytes(render(made, kind))
        files.append(file)
    return files
