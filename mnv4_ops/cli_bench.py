"""Commands about figures: `mnv4-ops roofline`. Registered in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mnv4_ops.cli_common import Json, check_writable, console_for, fail, number, words, write

_ROOFLINE_COLUMNS = ("block", "kind", "MMAC", "layers MB", "fused MB", "layers cost", "fused cost", "fused/layers",
                     "layers bound by", "fused bound by")  # fmt: skip
_DEFAULT_RIDGES = "0,pixel6-cpu,100,pixel8-edgetpu"


def roofline(
    model: Annotated[
        list[str], typer.Option(help="conv_small ... hybrid_large, all-conv, all-hybrid, all; commas or repeated.")
    ] = ["conv_medium"],  # noqa: B006 - typer reads the default
    ridge: Annotated[
        list[str],
        typer.Option(
            help="Ridge points in MACs per byte, 0 to 500; pixel6-cpu, s23-cpu, pixel4-dsp, pixel8-edgetpu (fitted in "
            "the paper to INT8 latencies); machine: measured here, fp32 and DRAM. Commas or repeated."
        ),
    ] = [_DEFAULT_RIDGES],  # noqa: B006
    resolution: Annotated[
        str | None, typer.Option(metavar="N", help="Side in pixels; default: the model's own.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N", help="Images; weights are read once.")] = "1",
    itemsize: Annotated[
        str, typer.Option("--bytes", metavar="N", help="Bytes an element: 1 INT8 (as the fitted ridge points), 2, 4.")
    ] = "1",
    sweep: Annotated[bool, typer.Option("--sweep", help="Also compare MobileNetV1 to V4 (needs timm).")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write figures there, PNG and SVG (needs matplotlib).")
    ] = None,
    json_file: Json = None,
) -> None:
    """The paper's roofline: what each block costs at a ridge point, memory- or compute-bound, fused against layer by
    layer. No figure of it is measured, but for `--ridge machine`.
    """
    from mnv4_ops.bench import plots, roofline_report
    from mnv4_ops.bench.errors import BenchError
    from mnv4_ops.bench.roofline import Scale

    check_writable("--json", json_file)
    side = None if resolution is None else number("--resolution", resolution, low=32, high=2048)
    images = number("--batch", batch, low=1, high=4096)
    element = number("--bytes", itemsize, low=1, high=8)
    console = console_for(json_file)
    try:
        if out is not None:
            plots.require()
            if out.is_file():
                raise BenchError(f"--out: expected a folder, got the file {str(out)!r}")
        scale = Scale(images, element)
        names = roofline_report.models_of(words(model))
        ridges = roofline_report.ridges_of(words(ridge))
        document = roofline_report.document(names, ridges, side, sweep=sweep, scale=scale)
        _print_roofline(console, document)
        if out is not None:
            for file in roofline_report.write_figures(out, names, ridges, side, sweep=sweep, scale=scale):
                console.print(str(file), markup=False)
    except BenchError as error:
        raise fail(str(error)) from None
    write(json_file, document)


def _print_roofline(console: Console, document: dict[str, Any]) -> None:
    for model in document["models"]:
        for point in model["ridges"]:
            table = Table(
                title=f"{model['model']} {model['resolution']}, batch {document['batch']}, "
                f"{document['itemsize']} byte(s) an element, ridge point {point['label']} MACs/byte",
                title_justify="left",
                title_style="bold",
            )
            for index, column in enumerate(_ROOFLINE_COLUMNS):
                table.add_column(column, justify="left" if index < 2 else "right")
            for row, cost in zip(model["blocks"], point["blocks"], strict=True):
                table.add_row(
                    row["name"], row["kind"], f"{row['macs'] / 1e6:.2f}", f"{row['bytes'] / 1e6:.3f}",
                    f"{row['fused_bytes'] / 1e6:.3f}", f"{cost['cost'] / 1e6:.2f}", f"{cost['fused_cost'] / 1e6:.2f}",
                    f"{cost['fused_cost'] / cost['cost']:.2f}", cost["bound"], cost["fused_bound"],
                )  # fmt: skip
            table.add_section()
            sums = (sum(row[key] for row in model["blocks"]) for key in ("macs", "bytes", "fused_bytes"))
            table.add_row(
                "all", "", *(f"{value / 1e6:.2f}" for value in sums),
                f"{point['cost'] / 1e6:.2f}", f"{point['fused_cost'] / 1e6:.2f}",
                f"{point['fused_cost'] / point['cost']:.2f}", f"memory {100 * point['memory_share']:.0f} %", "",
            )  # fmt: skip
            console.print(table)
    if not document["sweep"]:
        return
    labels = [point["label"] for point in document["models"][0]["ridges"]]
    table = Table(
        title="Generations: G MAC-equivalents layer by layer, and relative to the cheapest at least as accurate",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("model")
    for column in ("published top-1", *labels):
        table.add_column(column, justify="right")
    for row in document["sweep"]:
        cells = [f"{c / 1e9:.3f} ({r:.2f}x)" for c, r in zip(row["costs"], row["relative"], strict=True)]
        table.add_row(f"{row['model']} {row['resolution']}", f"{row['top1']:.1f} %", *cells)
    console.print(table)
