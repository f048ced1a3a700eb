"""`mnv4-ops info | bench | check | tune | roofline | pareto | report | compare`.

Exit status: 0 fine, 1 a check or the gate failed, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnv4_ops import cli_bench
from mnv4_ops.cli_common import (
    Device,
    Json,
    Keep,
    check_writable,
    console_for,
    device_of,
    dtypes_of,
    earlier,
    fail,
    finish,
    keep_part,
    number,
    numbers,
    words,
    write,
)

app = typer.Typer(
    name="mnv4-ops",
    help="Fused MobileNetV4 inference kernels for PyTorch: what is here, how fast it is, whether it is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _size(size: int | None) -> str:
    if not size:
        return "unknown"
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


@app.command()
def info(json_file: Json = None) -> None:
    """Versions, CPU features, tiers, threads, caches, GPU, peers, and why anything is missing."""
    from mnv4_ops import _info

    check_writable("--json", json_file)
    facts = _info.collect()
    facts["peers"] = _peer_reasons()
    console = console_for(json_file)
    if json_file is None or json_file != Path("-"):
        _print_info(console, facts)
    write(json_file, facts)


def _peer_reasons() -> dict[str, str | None]:
    import torch

    from mnv4_ops.bench import peers

    shown = (*peers.PEERS, *(peers.GPU_PEERS if torch.cuda.is_available() else ()))
    return {peer.name: peer.available() for peer in shown}


def _print_info(console: Console, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        # "mnv4-ops[bench]" is no markup
        table.add_row(name, Text(value))

    native, cpu, threads = facts["native"], facts["cpu"], facts["threads"]
    row("mnv4_ops", f"{facts['version']}, {facts['python']}, {facts['platform']}")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    row("packages", packages)
    row("native library", str(native["file"]) if native["loaded"] else f"missing: {native['reason']}")
    if native["build"]:
        build = native["build"]
        row("built with", f"{build['compiler']}, tiers {', '.join(build['tiers'])}")
    if cpu:
        row("CPU", cpu["model"])
        row("features", " ".join(cpu["features"]))
        row("caches", ", ".join(f"{level.upper()} {_size(cpu[level])}" for level in ("l1d", "l2", "l3")))
        row("tiers", f"{', '.join(cpu['tiers'])}; in use: {cpu['tier']}")
    row("threads", f"torch {threads['torch']}, CPUs available {threads['cpus']}")
    row("OpenMP runtime", native["openmp_runtime"] or "none found")
    for gpu in facts["gpus"]:
        row(f"GPU {gpu['index']}", f"{gpu['name']} ({_size(gpu['memory_bytes'])}, {gpu['capability']})")
        tables = [f"{gpu['tuned'][kind]} entries {kind}" for kind in ("shipped", "own") if gpu["tuned"][kind]]
        row("tuned", ", ".join(tables) or "no table for this GPU, a formula is used (`mnv4-ops tune` makes one)")
    if not facts["gpus"]:
        row("GPU", "none")
    row("GPU kernels", facts["gpu_kernels"] or "available: float16, bfloat16, float32")
    for name, value in facts["environment"].items():
        row(name, value)
    for name, reason in facts["peers"].items():
        row(f"peer {name}", reason or "available")
    for problem in facts["problems"]:
        row("missing", problem)
    console.print(table)


@app.command()
def bench(
    model: Annotated[
        list[str],
        typer.Option(
            help="timm model (mobilenetv4_conv_small or conv_small), or all-conv, all-hybrid, all; commas or repeated."
        ),
    ] = ["conv_small"],  # noqa: B006 - typer reads the default
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Photograph; default: one from scikit-image.")
    ] = None,
    batch: Annotated[list[str], typer.Option(help="Batch sizes, e.g. 1,8.")] = ["1"],  # noqa: B006
    threads: Annotated[list[str] | None, typer.Option(help="Numbers of threads, e.g. 1,2; default: all CPUs.")] = None,
    resolution: Annotated[
        str | None, typer.Option(metavar="N", help="Side in pixels; default: the model's own.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="all, none, torch, or names separated by commas (see `mnv4-ops info`).")
    ] = "all",
    repeats: Annotated[str, typer.Option(metavar="N", help="Rounds; each variant has one turn per round.")] = "15",
    seconds: Annotated[
        str, typer.Option(metavar="N", help="Stop the timed part of a table after this long (at least 3 rounds).")
    ] = "60",
    processes: Annotated[
        str, typer.Option(metavar="N", help="Fresh processes per table; the one with the median ratio is shown (CPU).")
    ] = "1",
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="One row per block of the models instead of whole models."),
    ] = False,
    ops: Annotated[
        list[str] | None,
        typer.Option(
            help="Single ops of the models instead: all, pointwise, depthwise, extra_dw ...; commas or repeated."
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Of --ops (on a GPU also --blocks): no row begins after N seconds; with --keep those that the file "
            "lacks come first.",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="On a GPU: float16 (the default), bfloat16, float32; commas or repeated.")
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    keep: Keep = False,
) -> None:
    """Time a MobileNetV4 on a real photograph, original and enabled, against every installed peer.

    First the enabled logits must agree with the original's; then all variants run interleaved, each table in a fresh
    process that is pinned to as many CPUs as threads. On a GPU: CUDA graphs by the clock of the device, and calls by
    that of the host.
    """
    from mnv4_ops.bench import gpu_report, gpu_run, inputs, machine, op_run, report, run
    from mnv4_ops.bench.errors import BenchError

    check_writable("--json", json_file)
    check_writable("--markdown", markdown)
    only_gpu = {} if ops else {"dtype": ("cuda", dtype)}
    single = bool(ops) or (blocks and device == "cuda")
    device_of(device, threads=("cpu", threads), **only_gpu)
    for option, given in (("--ops", ops), ("--keep", keep)):
        if given and blocks and device == "cpu":
            raise fail(f"{option}: does not go with --blocks")
    if limit is not None and not single:
        raise fail("--limit: goes with --ops (on a GPU also with --blocks)")
    side = None if resolution is None else number("--resolution", resolution, low=32, high=2048)
    rounds = number("--repeats", repeats, low=1, high=10000)
    allowed = None if limit is None else number("--limit", limit, low=10, high=86400)
    fresh = number("--processes", processes, low=1, high=99)
    common: dict[str, Any] = {"peers": peers, "resolution": side}
    common["seconds"] = number("--seconds", seconds, low=1, high=86400)
    plan: op_run.OpsPlan | gpu_run.GpuPlan | run.Plan
    measure: Any
    try:
        common["batches"] = numbers("--batch", batch)
        if single or device == "cpu":
            common |= {"threads": numbers("--threads", threads or [str(len(machine.available_cpus()))])}
            common |= {"repeats": rounds, "processes": fresh}
        if single:
            dtypes = dtypes_of(dtype) or ["float32" if device == "cpu" else "float16"]
            common |= {"models": words(model), "ops": words(ops or ["all"]), "dtypes": dtypes, "device": device}
            plan = op_run.OpsPlan(blocks=blocks, limit=allowed, **common)
            measure = op_run.run
        else:
            common |= {"models": inputs.resolve_models(words(model)), "image": image}
            if device == "cuda":
                plan = gpu_run.GpuPlan(dtypes=dtypes_of(dtype) or ["float16"], rounds=rounds, **common)
                measure = gpu_run.models
            else:
                plan, measure = run.Plan(**common), run.blocks if blocks else run.models
        plan.validate()
        schema = op_run.SCHEMA if single else report.SCHEMA if device == "cpu" else gpu_report.SCHEMA
        environment = machine.environment if device == "cpu" else gpu_run.environment
        old = earlier(keep, json_file, schema, environment)
        if old is not None and isinstance(plan, op_run.OpsPlan) and allowed is not None:
            plan = replace(plan, known=frozenset(map(op_run.key, old["rows"])))
        # a run may be cut off: what it has is on disk after each row or cell
        if (single or device == "cuda") and json_file != Path("-"):
            measure = partial(measure, save=lambda document: keep_part(document, json_file, old))
        outcome = measure(plan, console_for(json_file))
    except BenchError as error:
        raise fail(str(error)) from None
    finish(outcome, json_file, markdown, old)


@app.command()
def check(
    tier: Annotated[list[str] | None, typer.Option(help="Tiers to check; default: all that this CPU has.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small odd images only: seconds instead of minutes.")] = False,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="On a GPU: float16, bfloat16, float32 (the default: all); commas or repeated."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Check every kernel on this machine against float64: all blocks of all models, every tier or dtype."""
    from mnv4_ops import _native

    if _native.core is None:
        raise fail(f"check needs the native library, which is missing: {_native.reason}")
    device_of(device, tier=("cpu", tier), dtype=("cuda", dtype))
    suite: Any
    if device == "cuda":
        from mnv4_ops import check_gpu as suite
        from mnv4_ops.ops import cuda

        if (reason := cuda.unavailable()) is not None:
            raise fail(f"--device cuda: {reason}")
        chosen = dtypes_of(dtype) or list(suite.DTYPES)
    else:
        from mnv4_ops import check as suite

        available = _native.core.cpu_info()["tiers"]
        chosen = words(tier or []) or list(available)
        for name in chosen:
            if name not in available:
                raise fail(f"--tier: expected one of {', '.join(available)} (what this CPU has), got {name!r}")
    check_writable("--json", json_file)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mnv4_ops.check import worst

    console = console_for(json_file)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("checking", total=None)

        def on_case(case: Any, index: int, total: int) -> None:
            progress.update(bar, completed=index, total=total, description=case.where)

        results = suite.run(chosen, quick=quick, on_case=on_case)
    _print_check(console, worst(results), [r for r in results if not r.ok], len(results))
    write(json_file, {"schema": "mnv4-ops/check/1", "quick": quick, "results": [r.as_dict() for r in results]})
    if not all(r.ok for r in results):
        raise typer.Exit(1)


def _print_check(console: Console, worst: list[Any], failed: list[Any], total: int) -> None:
    table = Table(
        title="Worst errors against float64; above 1.00 of the allowed error fails",
        title_justify="left",
        title_style="bold",
    )
    for column in ("kind", "tier", "dtype", "worst in"):
        table.add_column(column)
    for column in ("input", "max error", "max|ref|", "of allowed max", "of allowed rms"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in [*worst, *(r for r in failed if r not in worst)]:
        case = result.case
        table.add_row(
            case.spec.kind,
            result.tier,
            case.spec.dtype,
            case.where,
            f"{case.batch}x{case.spec.channels[0]}x{case.height}x{case.width}",
            f"{result.max_error:.1e}",
            f"{result.scale:.2g}",
            f"{result.error:.2f}",
            f"{result.rms:.2f}",
            "ok" if result.ok else "FAILED",
            style=None if result.ok else "bold red",
        )
    console.print(table)
    console.print(f"{total - len(failed)} of {total} checks passed")


@app.command()
def tune(
    model: Annotated[
        list[str] | None, typer.Option(help="As in bench; the blocks of these models are measured; default: all-conv.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float16 (the default), bfloat16, float32; commas or repeated.")
    ] = None,
    batch: Annotated[list[str], typer.Option(help="Batch sizes, e.g. 1,8.")] = ["1,8,64,256"],  # noqa: B006
    resolution: Annotated[
        str | None, typer.Option(metavar="N", help="Side in pixels; default: the model's own.")
    ] = None,
) -> None:
    """Measure tile configurations on this GPU and keep the best in your cache folder, where they come before the
    shipped ones. Takes minutes to hours; models that run meanwhile are timed with it.
    """
    from mnv4_ops import tuning
    from mnv4_ops.bench import inputs
    from mnv4_ops.bench.errors import BenchError

    batches = numbers("--batch", batch)
    side = None if resolution is None else number("--resolution", resolution, low=32, high=2048)
    dtypes = dtypes_of(dtype) or ["float16"]
    console = console_for(None)
    try:
        models = inputs.resolve_models(words(model or ["all-conv"]))
        if not models:
            raise fail("--model: expected at least one model")
        with console.status("tuning") if console.is_terminal else contextlib.nullcontext():
            file, count = tuning.tune(
                models, dtypes, batches, resolution=side, log=lambda line: console.print(line, markup=False)
            )
    except BenchError as error:
        raise fail(str(error)) from None
    except RuntimeError as error:
        raise fail(f"tune: {error}") from None
    console.print(f"{count} entries in {file}", markup=False)


for command in (cli_bench.roofline, cli_bench.pareto, cli_bench.report, cli_bench.compare):
    app.command()(command)


def main() -> None:
    """Entry point of the `mnv4-ops` command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    app()


if __name__ == "__main__":
    main()
