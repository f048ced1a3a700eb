"""The whole of `mnv4-ops bench`: a plan of cells, each in its own process, with progress and tables on a console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mnv4_ops.bench import cell, inputs, isolate, machine, report
from mnv4_ops.bench.errors import BenchError

_METHOD = {
    "order": "all variants interleaved in one process, random order per round",
    "turn": "wait until the process is quiet, one warm-up call, then timed calls for about 30 ms (1 to 12)",
    "statistics": "median, 20 % and 80 % quantiles, minimum of the timed calls; milliseconds per call",
    "pinning": "a fresh process per cell, pinned to as many CPUs as threads",
    "input": "prepared in the layout that each variant likes best, outside the clock; mnv4_ops gets contiguous NCHW",
}


@dataclass(frozen=True)
class Plan:
    """What to measure: the product of models, batches and threads."""

    models: list[str]
    batches: list[int]
    threads: list[int]
    peers: str = "all"
    image: str | None = None
    resolution: int | None = None
    repeats: int = 15
    seconds: float = 60.0
    processes: int = 1

    def validate(self) -> None:
        """Raises BenchError for what would only be found out in the middle."""
        from mnv4_ops.bench import peers as registry

        if not self.models:
            raise BenchError("--model: expected at least one model")
        registry.select(self.peers)
        inputs.photograph(self.image)
        for threads in self.threads:
            machine.pick_cpus(threads)

    def cells(self) -> list[tuple[str, int, int]]:
        return [(m, b, t) for m in self.models for b in self.batches for t in self.threads]


@dataclass(frozen=True)
class Outcome:
    document: dict[str, Any]
    markdown: str
    ok: bool


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def _describe(event: dict[str, Any]) -> str:
    if event["stage"] == "prepare":
        return f"preparing {event['peer']}"
    if event["stage"] == "round":
        return "timing"
    if event["stage"] == "block":
        return f"block {event['name']}"
    if event["stage"] == "row":
        return "next block"
    if event["stage"] == "ceilings":
        return "ceilings measured"
    return "loading model and photograph"


def middle(found: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Of the same measurement in several fresh processes: the one with the median ratio, a red one before all. It keeps
    the ratios of all of them as `speedups_of_processes`.
    """
    red = next((result for result in found if result["red"]), None)
    if red is not None or len(found) == 1:
        return red or found[0]
    ranked = sorted(found, key=lambda result: float(result.get(key) or 0.0))
    ratios = [round(float(result.get(key) or 0.0), 4) for result in ranked]
    return ranked[(len(ranked) - 1) // 2] | {"speedups_of_processes": ratios}


def run_cell(
    task: Any,
    request: Any,
    title: str,
    console: Console,
    threads: int,
    compilers: int = 1,
    on_event: isolate.Notify | None = None,
) -> Any:
    """`task(request, notify)` in a process of its own, with its progress on the console; `on_event` gets what it says
    meanwhile.
    """
    with _progress(console) as progress:
        bar = progress.add_task(f"{title}: starting", total=None)

        def notify(event: dict[str, Any]) -> None:
            if on_event is not None:
                on_event(event)
            progress.update(
                bar,
                description=f"{title}: {_describe(event)}",
                completed=event.get("done", 0),
                total=event.get("total"),
            )

        return isolate.run(task, request, threads=threads, notify=notify, compilers=compilers)


def weights(models: list[str], console: Console) -> dict[str, str]:
    """Per model: empty for pretrained weights, otherwise why they are random. Said plainly."""
    notes = {}
    for model in models:
        with console.status(f"looking for the pretrained weights of {model}") if console.is_terminal else _nothing():
            notes[model] = inputs.fetch_weights(model) or ""
        if notes[model]:
            console.print(f"{model}: {notes[model]}; using seeded random weights with randomised BatchNorm statistics")
        else:
            console.print(f"{model}: pretrained weights")
    return notes


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def models(plan: Plan, console: Console) -> Outcome:
    """One table per cell and a summary. `ok` is False when a gate was red or the enabled model could not run."""
    from mnv4_ops.bench import peers as registry

    notes = weights(plan.models, console)
    console.print(f"photograph: {plan.image or inputs.PHOTOGRAPH}")
    names = tuple(peer.name for peer in registry.select(plan.peers))
    cells: list[dict[str, Any]] = []
    for model, batch, threads in plan.cells():
        request = cell.CellRequest(
            model, batch, threads, plan.resolution, plan.image, names, notes[model], plan.repeats, plan.seconds
        )
        title = f"{inputs.ledger_name(model)} batch {batch} threads {threads}"
        try:
            found = [run_cell(cell.measure_cell, request, title, console, threads) for _ in range(plan.processes)]
        except RuntimeError as error:
            raise BenchError(f"{title}: the measuring process failed: {str(error).splitlines()[-1]}") from error
        result = middle(found, "speedup_vs_best_peer")
        cells.append(result)
        if result["red"]:
            console.print(f"[bold red]red[/]: {report.title(result)}: {result['red']}; no speed is shown")
            continue
        console.print()
        console.print(report.cell_table(result))
        for note in report.cell_notes(result):
            console.print(f"  {note}", markup=False)
    console.print()
    console.print(report.summary_table(cells))
    method = {**_METHOD, "photograph": plan.image or inputs.PHOTOGRAPH}
    if plan.processes > 1:
        method["processes"] = f"{plan.processes} fresh processes a cell, the one with the median ratio is shown"
    document = report.document(machine.environment(), method, cells)
    ok = all(not c["red"] and cell.OURS in c["variants"] for c in cells)
    return Outcome(document, report.markdown(document), ok)


def blocks(plan: Plan, console: Console) -> Outcome:
    """One table of blocks per cell."""
    from mnv4_ops.bench import blocks as suite
    from mnv4_ops.bench import peers as registry

    names = suite.DEFAULT_PEERS if plan.peers == "all" else tuple(peer.name for peer in registry.select(plan.peers))
    results, texts = [], []
    for model, batch, threads in plan.cells():
        request = suite.BlocksRequest(model, batch, threads, plan.resolution, names, repeats=plan.repeats)
        title = f"{inputs.ledger_name(model)} batch {batch} threads {threads}"
        result = run_cell(suite.measure_blocks, request, title, console, threads)
        results.append(result)
        texts.append(suite.markdown(result))
        console.print(suite.table(result))
    document = {"schema": suite.SCHEMA, "environment": machine.environment(), "method": _METHOD, "cells": results}
    ok = all(suite.OURS in row["variants"] for result in results for row in result["blocks"])
    return Outcome(document, "\n".join(texts), ok)
