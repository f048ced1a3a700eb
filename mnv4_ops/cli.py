"""`mnv4-ops info | bench | check | tune`. Exit status: 0 fine, 1 a check or the gate failed, 2 wrong usage."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="mnv4-ops",
    help="Fused MobileNetV4 inference kernels for PyTorch: what is here, how fast it is, whether it is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEVICES = ("cpu", "cuda")
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON ('-': stdout).")]


def _fail(message: str) -> typer.Exit:
    """One line on stderr; raise the result."""
    typer.echo(f"mnv4-ops: error: {message}", err=True)
    return typer.Exit(2)


def _console(json_file: Path | None) -> Console:
    # with JSON on stdout the tables go to stderr; a pipe gets wide lines that nothing wraps
    console = Console(stderr=json_file == Path("-"))
    return console if console.is_terminal else Console(stderr=json_file == Path("-"), width=200, highlight=False)


def _write(json_file: Path | None, value: Any) -> None:
    if json_file is None:
        return
    text = json.dumps(value, indent=1) + "\n"
    if json_file == Path("-"):
        sys.stdout.write(text)
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(text)


def _check_writable(option: str, file: Path | None) -> None:
    # found out now and not after ten minutes of measuring
    if file is None or file == Path("-"):
        return
    if file.is_dir():
        raise _fail(f"{option}: expected a file to write, got the folder {str(file)!r}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise _fail(f"{option}: {str(file)!r} cannot be written: {error.strerror}") from None


def _words(values: list[str]) -> list[str]:
    return [word for value in values for word in (part.strip() for part in value.split(",")) if word]


def _number(option: str, text: str, *, low: int, high: int) -> int:
    # parsed here, so that a wrong one is one line like every other error
    if not text.isdecimal() or not low <= int(text) <= high:
        raise _fail(f"{option}: expected a whole number from {low} to {high}, got {text!r}")
    return int(text)


def _device(device: str, **only: tuple[str, Any]) -> str:
    """Checks --device; `only` maps options to (the device that has them, the value given or None)."""
    if device not in DEVICES:
        raise _fail(f"--device: expected one of {', '.join(DEVICES)}, got {device!r}")
    for option, (owner, value) in only.items():
        if value and owner != device:
            raise _fail(f"--{option}: goes with --device {owner}, not with --device {device}")
    return device


def _dtypes(words: list[str] | None) -> list[str]:
    from mnv4_ops.check_gpu import DTYPES

    names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    chosen = [names.get(word, word) for word in _words(words or [])]
    for name in chosen:
        if name not in DTYPES:
            raise _fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return list(dict.fromkeys(chosen))


def _numbers(option: str, values: list[str], *, low: int = 1, high: int = 4096) -> list[int]:
    numbers = [_number(option, word, low=low, high=high) for word in _words(values)]
    if not numbers:
        raise _fail(f"{option}: expected at least one number")
    return list(dict.fromkeys(numbers))


def _size(size: int | None) -> str:
    if not size:
        return "unknown"
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


@app.command()
def info(json_file: Json = None) -> None:
    """Versions, CPU features, tiers, threads, caches, GPU, peers, and why anything is missing."""
    from mnv4_ops import _info

    _check_writable("--json", json_file)
    facts = _info.collect()
    facts["peers"] = _peer_reasons()
    console = _console(json_file)
    if json_file is None or json_file != Path("-"):
        _print_info(console, facts)
    _write(json_file, facts)


def _peer_reasons() -> dict[str, str | None]:
    from mnv4_ops.bench import peers

    return {peer.name: peer.available() for peer in peers.PEERS}


def _print_info(console: Console, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    native, cpu, threads = facts["native"], facts["cpu"], facts["threads"]
    table.add_row("mnv4_ops", f"{facts['version']}, {facts['python']}, {facts['platform']}")
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    table.add_row("packages", packages)
    table.add_row("native library", str(native["file"]) if native["loaded"] else f"missing: {native['reason']}")
    if native["build"]:
        build = native["build"]
        table.add_row("built with", f"{build['compiler']}, tiers {', '.join(build['tiers'])}")
    if cpu:
        table.add_row("CPU", cpu["model"])
        table.add_row("features", " ".join(cpu["features"]))
        table.add_row("caches", ", ".join(f"{level.upper()} {_size(cpu[level])}" for level in ("l1d", "l2", "l3")))
        table.add_row("tiers", f"{', '.join(cpu['tiers'])}; in use: {cpu['tier']}")
    table.add_row("threads", f"torch {threads['torch']}, CPUs available {threads['cpus']}")
    table.add_row("OpenMP runtime", native["openmp_runtime"] or "none found")
    for gpu in facts["gpus"]:
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']} ({_size(gpu['memory_bytes'])}, {gpu['capability']})")
        tables = [f"{gpu['tuned'][kind]} entries {kind}" for kind in ("shipped", "own") if gpu["tuned"][kind]]
        table.add_row(
            "tuned", ", ".join(tables) or "no table for this GPU, a formula is used (`mnv4-ops tune` makes one)"
        )
    if not facts["gpus"]:
        table.add_row("GPU", "none")
    table.add_row("GPU kernels", facts["gpu_kernels"] or "available: float16, bfloat16, float32")
    for name, value in facts["environment"].items():
        table.add_row(name, value)
    for name, reason in facts["peers"].items():
        table.add_row(f"peer {name}", reason or "available")
    for problem in facts["problems"]:
        table.add_row("missing", problem)
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
    blocks: Annotated[
        bool, typer.Option("--blocks", help="One row per block of the model instead of whole models (CPU).")
    ] = False,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="On a GPU: float16 (the default), bfloat16, float32; commas or repeated.")
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
) -> None:
    """Time a MobileNetV4 on a real photograph, original and enabled, against every installed peer.

    First the enabled logits must agree with the original's; then all variants run interleaved, each table in a fresh
    process that is pinned to as many CPUs as threads. On a GPU: CUDA graphs by the clock of the device, and calls by
    that of the host.
    """
    from mnv4_ops.bench import gpu_run, inputs, machine, run
    from mnv4_ops.bench.errors import BenchError

    _check_writable("--json", json_file)
    _check_writable("--markdown", markdown)
    _device(device, threads=("cpu", threads), blocks=("cpu", blocks), dtype=("cuda", dtype))
    side = None if resolution is None else _number("--resolution", resolution, low=32, high=2048)
    rounds = _number("--repeats", repeats, low=1, high=10000)
    limit = _number("--seconds", seconds, low=1, high=86400)
    try:
        if device == "cuda":
            gpu_plan = gpu_run.GpuPlan(
                models=inputs.resolve_models(_words(model)),
                batches=_numbers("--batch", batch),
                dtypes=_dtypes(dtype) or ["float16"],
                peers=peers,
                image=image,
                resolution=side,
                rounds=rounds,
                seconds=limit,
            )
            gpu_plan.validate()
            _finish_bench(gpu_run.models(gpu_plan, _console(json_file)), json_file, markdown)
            return
        plan = run.Plan(
            models=inputs.resolve_models(_words(model)),
            batches=_numbers("--batch", batch),
            threads=_numbers("--threads", threads or [str(len(machine.available_cpus()))]),
            peers=peers,
            image=image,
            resolution=side,
            repeats=rounds,
            seconds=limit,
        )
        plan.validate()
        outcome = run.blocks(plan, _console(json_file)) if blocks else run.models(plan, _console(json_file))
    except BenchError as error:
        raise _fail(str(error)) from None
    _finish_bench(outcome, json_file, markdown)


def _finish_bench(outcome: Any, json_file: Path | None, markdown: Path | None) -> None:
    _write(json_file, outcome.document)
    if markdown is not None:
        markdown.write_text(outcome.markdown)
    if not outcome.ok:
        raise typer.Exit(1)


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
        raise _fail(f"check needs the native library, which is missing: {_native.reason}")
    _device(device, tier=("cpu", tier), dtype=("cuda", dtype))
    suite: Any
    if device == "cuda":
        from mnv4_ops import check_gpu as suite
        from mnv4_ops.ops import cuda

        if (reason := cuda.unavailable()) is not None:
            raise _fail(f"--device cuda: {reason}")
        chosen = _dtypes(dtype) or list(suite.DTYPES)
    else:
        from mnv4_ops import check as suite

        available = _native.core.cpu_info()["tiers"]
        chosen = _words(tier or []) or list(available)
        for name in chosen:
            if name not in available:
                raise _fail(f"--tier: expected one of {', '.join(available)} (what this CPU has), got {name!r}")
    _check_writable("--json", json_file)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mnv4_ops.check import worst

    console = _console(json_file)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("checking", total=None)

        def on_case(case: Any, index: int, total: int) -> None:
            progress.update(bar, completed=index, total=total, description=case.where)

        results = suite.run(chosen, quick=quick, on_case=on_case)
    _print_check(console, worst(results), [r for r in results if not r.ok], len(results))
    _write(json_file, {"schema": "mnv4-ops/check/1", "quick": quick, "results": [r.as_dict() for r in results]})
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

    batches = _numbers("--batch", batch)
    side = None if resolution is None else _number("--resolution", resolution, low=32, high=2048)
    dtypes = _dtypes(dtype) or ["float16"]
    console = _console(None)
    try:
        models = inputs.resolve_models(_words(model or ["all-conv"]))
        if not models:
            raise _fail("--model: expected at least one model")
        with console.status("tuning") if console.is_terminal else contextlib.nullcontext():
            file, count = tuning.tune(
                models, dtypes, batches, resolution=side, log=lambda line: console.print(line, markup=False)
            )
    except BenchError as error:
        raise _fail(str(error)) from None
    except RuntimeError as error:
        raise _fail(f"tune: {error}") from None
    console.print(f"{count} entries in {file}", markup=False)


def main() -> None:
    """Entry point of the `mnv4-ops` command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    app()


if __name__ == "__main__":
    main()
