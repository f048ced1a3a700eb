"""Commands about figures: `mnv4-ops roofline`. Registered in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mnv4_ops.cli_common import Json, Keep, check_writable, console_for, earlier, fail, finish, number, words, write

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


def report(
    results: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Result files (`--json` of bench and pareto).")
    ] = Path("benchmarks/results"),
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page: one HTML file that needs nothing else.")] = Path(
        "mnv4_ops-report.html"
    ),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same as Markdown, without figures.")
    ] = None,
) -> None:
    """One page of everything in a folder of result files: sortable tables, figures, method and environment."""
    from mnv4_ops.bench import page, page_report
    from mnv4_ops.bench.errors import BenchError

    check_writable("--out", out)
    check_writable("--markdown", markdown)
    try:
        title, lead, sections = page_report.build(results)
        text = page.html(title, lead, sections)
    except BenchError as error:
        raise fail(str(error)) from None
    out.write_text(text)
    typer.echo(f"{out} ({len(text.encode()) / 1e6:.1f} MB, {len(sections)} sections)")
    if markdown is not None:
        markdown.write_text(page.markdown(title, lead, sections))
        typer.echo(str(markdown))


def pareto(
    family: Annotated[
        list[str] | None,
        typer.Option(help="MobileNetV4, MobileNetV3, EfficientNet-Lite ...; commas or repeated; default: all."),
    ] = None,
    threads: Annotated[str, typer.Option(metavar="N", help="Threads of every model.")] = "1",
    repeats: Annotated[str, typer.Option(metavar="N", help="Rounds per model.")] = "9",
    seconds: Annotated[str, typer.Option(metavar="N", help="Stop a model after this long (at least 3 rounds).")] = "10",
    resolution: Annotated[
        str | None, typer.Option(metavar="N", help="Side in pixels; default: that of the published accuracy.")
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the figure there, PNG and SVG.")] = None,
    keep: Keep = False,
) -> None:
    """Accuracy against latency: published top-1 of timm's models, their latency here, before and after enable()."""
    from mnv4_ops.bench import machine, page_plots, plots
    from mnv4_ops.bench import pareto as suite
    from mnv4_ops.bench import report as texts
    from mnv4_ops.bench.errors import BenchError

    check_writable("--json", json_file)
    check_writable("--markdown", markdown)
    count = number("--threads", threads, low=1, high=4096)
    rounds, limit = number("--repeats", repeats, low=1, high=10000), number("--seconds", seconds, low=1, high=86400)
    side = None if resolution is None else number("--resolution", resolution, low=32, high=2048)
    try:
        machine.pick_cpus(count)
        old = earlier(keep, json_file, suite.SCHEMA, machine.environment, threads=count)
        if plot is not None:
            plots.require()
        outcome = suite.measure(
            words(family or []), count, console_for(json_file), repeats=rounds, seconds=limit, resolution=side
        )
        if plot is not None:
            title = f"Batch 1, {texts.threads_text(count)}, fp32"
            plots.save(page_plots.pareto(title, outcome.document["points"]), plot, "pareto")
    except BenchError as error:
        raise fail(str(error)) from None
    finish(outcome, json_file, markdown, old)


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Result file: --json of bench, or of pytest benchmarks.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Result file of the same kind.")],
    threshold: Annotated[str, typer.Option(metavar="PERCENT", help="Smaller changes never count.")] = "3",
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Times as they are; default: relative to the peers that both files have.")
    ] = False,
    show: Annotated[bool, typer.Option("--all", help="Rows that did not change as well.")] = False,
    json_file: Json = None,
) -> None:
    """What changed between two result files, beyond noise. Exit status 1 if a row of mnv4_ops got slower."""
    from dataclasses import asdict

    from mnv4_ops.bench import compare as suite
    from mnv4_ops.bench.errors import BenchError

    check_writable("--json", json_file)
    percent = number("--threshold", threshold, low=0, high=1000)
    try:
        found = suite.changes(suite.read(old), suite.read(new), threshold=percent / 100, absolute=absolute)
        if not found:
            raise BenchError(f"no row is in both {str(old)!r} and {str(new)!r}")
    except BenchError as error:
        raise fail(f"compare: {error}") from None
    verdicts = [change.verdict for change in found]
    console = console_for(json_file)
    if show or set(verdicts) != {"same"}:
        console.print(suite.table(found, everything=show))
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("slower", "faster", "same"))
    console.print(f"{len(found)} rows in both: {counts}; geometric mean {suite.geomean(found):.3f}")
    write(json_file, [asdict(change) | {"verdict": change.verdict} for change in found])
    if "slower" in verdicts:
        raise typer.Exit(1)
