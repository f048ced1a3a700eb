"""The whole of `mnv4-ops bench --ops`: every case of some ops, a fresh pinned process per number of threads."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mnv4_ops.bench import ceilings, gpu_run, isolate, machine, report, rows
from mnv4_ops.bench import ops as registry
from mnv4_ops.bench import run as cpu_run
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.roofline_report import models_of

SCHEMA = "mnv4-ops/ops/1"
OURS = rows.OURS
_METHOD = {
    "gate": "every output is compared first: float32 on the CPU max|d|/max|ref| <= 2e-5, otherwise the 2x rule against "
    "float64 (peers twice that); a wrong one has no time",
    "order": "all variants of a row interleaved in one process, random order per round",
    "turn": "CPU: wait until the process is quiet, one warm-up call, 1 to 12 timed calls; "
    "GPU: replays of a CUDA graph between events, once with a warm L2 and once with a flushed one",
    "statistics": "median, 20 % and 80 % quantiles, minimum; milliseconds per call of a whole batch",
    "ours": "float32 on the CPU: the native object; otherwise the enabled module",
    "pinning": "a fresh process per number of threads, pinned to as many CPUs",
    "limit": "the larger of 2 x MACs at the FMA peak and bytes (input, weights, output once) at the bandwidth of the "
    "nearest level of memory that holds them, both measured in the same process",
    "best_peer": "the fastest of all peers that passed the gate",
}


@dataclass(frozen=True)
class OpsPlan:
    """`models`, `ops` and `peers` as the user wrote them, resolved by `validate`."""

    models: list[str]
    ops: list[str]
    batches: list[int]
    threads: list[int]
    dtypes: list[str]
    device: str = "cpu"
    peers: str = "all"
    resolution: int | None = None
    repeats: int = 7
    seconds: float = 1.5
    processes: int = 1

    def validate(self) -> None:
        """Raises BenchError for what would only be found out in the middle."""
        models_of(self.models)
        registry.select(self.ops)
        self.chosen()
        if self.device == "cuda":
            from mnv4_ops.ops import cuda

            if (reason := cuda.unavailable()) is not None:
                raise BenchError(f"--device cuda: {reason}")
        for threads in self.threads:
            machine.pick_cpus(threads)

    def chosen(self) -> tuple[str, ...]:
        """Names of the peers; `all` leaves out those that take minutes to prepare."""
        here = rows.peers_of(self.device)
        known = [peer.name for peer in here]
        if self.peers in ("all", "none"):
            return tuple(peer.name for peer in here if not peer.slow) if self.peers == "all" else ()
        names: list[str] = []
        for name in filter(None, (part.strip() for part in self.peers.split(","))):
            names += [peer for peer in known if peer.startswith("torch_")] if name == "torch" else [name]
        for name in names:
            if name not in known:
                have = ", ".join(known)
                raise BenchError(f"--peers: no peer {name!r} for ops on {self.device}; known: all, none, {have}")
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class OpsRequest:
    """Everything that one process measures."""

    models: tuple[str, ...]
    ops: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: int
    device: str
    peers: tuple[str, ...]
    resolution: int | None = None
    repeats: int = 7
    seconds: float = 1.5


def measure_ops(request: OpsRequest, notify: isolate.Notify) -> dict[str, Any]:
    """Ceilings of the machine and all rows. Meant for a fresh process (`isolate.run`)."""
    import torch

    torch.set_num_threads(request.threads)
    notify({"stage": "load"})
    if request.device == "cpu":
        precisions = tuple(dtype for dtype in request.dtypes if dtype != "float32")
        limits = ceilings.measure(request.threads, precisions=precisions)
    else:
        limits = ceilings.measure_gpu(tuple(request.dtypes))
    todo = [
        (op, case, rows.Setting(batch, request.threads, dtype, request.device))
        for op in registry.select(list(request.ops))
        for case in op.cases(request.models, request.resolution)
        for dtype in request.dtypes
        for batch in request.batches
    ]
    measured = []
    for index, (op, case, setting) in enumerate(todo):
        notify({"stage": "block", "name": f"{op.name} {case.name}", "done": index, "total": len(todo)})
        measured.append(
            rows.measure(
                op, case, setting, request.peers, repeats=request.repeats, seconds=request.seconds, ceilings=limits
            )
        )
    return {"ceilings": limits.as_dict(), "rows": measured}


def run(plan: OpsPlan, console: Console) -> cpu_run.Outcome:
    """Tables on the console; `ok` is False when a row was red."""
    environment = machine.environment() if plan.device == "cpu" else gpu_run.environment()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "method": _METHOD,
        "ceilings": [],
        "rows": [],
    }
    start = time.perf_counter()
    for threads in plan.threads:
        request = OpsRequest(
            tuple(models_of(plan.models)),
            tuple(op.name for op in registry.select(plan.ops)),
            tuple(plan.batches),
            tuple(plan.dtypes),
            threads,
            plan.device,
            plan.chosen(),
            plan.resolution,
            plan.repeats,
            plan.seconds,
        )
        title = f"ops, {report.threads_text(threads)}" if plan.device == "cpu" else "ops"
        try:
            runs = range(plan.processes)
            found = [cpu_run.run_cell(measure_ops, request, title, console, threads) for _ in runs]
        except RuntimeError as error:
            raise BenchError(f"{title}: the measuring process failed: {str(error).splitlines()[-1]}") from error
        document["ceilings"].append(found[0]["ceilings"])
        same = zip(*(result["rows"] for result in found), strict=True)
        document["rows"] += [cpu_run.middle(list(results), "vs_best_peer") for results in same]
    document["method"] = {**_METHOD, "seconds": round(time.perf_counter() - start)}
    if plan.processes > 1:
        document["method"]["processes"] = f"{plan.processes}, of each row the one with the median ratio is shown"
    for view in tables(document):
        console.print(view)
    for line in notes(document):
        console.print(line, markup=False)
    return cpu_run.Outcome(document, markdown(document), all(row["red"] is None for row in document["rows"]))


COLUMNS = ("case", "batch", "threads", "dtype", "mnv4_ops us", "20 - 80 %", "of limit", "bound", "best peer us",
            "vs best")  # fmt: skip


def groups(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(label of an op, its rows) in the order of the file."""
    labels = {op.name: op.label for op in registry.OPS}
    names = list(dict.fromkeys(row["op"] for row in document["rows"]))
    return [(labels.get(name, name), [row for row in document["rows"] if row["op"] == name]) for name in names]


def cells(row: dict[str, Any]) -> list[str]:
    """The texts of a row for `COLUMNS`."""
    head = [row["case"], str(row["batch"]), str(row["threads"]), row["dtype"]]
    if row["red"] is not None:
        return [*head, f"red: {row['red']}", *[""] * 5]
    ours = row["variants"][OURS]
    best = row["best_peer"]
    return [
        *head,
        f"{1e3 * ours['median_ms']:.1f}",
        f"{1e3 * ours['q20_ms']:.1f} - {1e3 * ours['q80_ms']:.1f}",
        f"{100 * ours['of_limit']:.0f} %" if "of_limit" in ours else "",
        row.get("bound", ""),
        f"{1e3 * row['variants'][best]['median_ms']:.1f} ({best})" if best else "",
        (f"{row['vs_best_peer']:.2f}x" + ("" if row["headline"] else " *")) if best else "",
    ]


def tables(document: dict[str, Any]) -> list[Table]:
    views = []
    for label, found in groups(document):
        view = Table(title=label, title_justify="left", title_style="bold")
        for index, column in enumerate(COLUMNS):
            view.add_column(column, justify="left" if index == 0 else "right")
        for row in found:
            view.add_row(*cells(row), style="bold red" if row["red"] is not None else None)
        views.append(view)
    return views


def notes(document: dict[str, Any]) -> list[str]:
    """Lines under the tables: geometric means, ceilings, who was missing."""
    lines = []
    for label, found in groups(document):
        ratios = [row["vs_best_peer"] for row in found if row.get("vs_best_peer") and row["headline"]]
        if ratios:
            won = sum(ratio >= 1 for ratio in ratios)
            mean = f"{geomean(ratios):.2f}x the best peer (geometric mean)"
            lines.append(f"{label}: {mean}, {won} of {len(ratios)} rows >= 1")
    for limit in document["ceilings"]:
        peaks = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in limit["peak_gflops"].items())
        levels = ", ".join(f"{name} {value:.0f}" for name, value in limit["bandwidth_gbs"].items())
        lines.append(f"ceilings, {report.threads_text(limit['threads'])}: {peaks}; GB/s: {levels}")
    busy = sum(row.get("preempted_per_call", 0) > report.BUSY for row in document["rows"])
    if busy:
        lines.append(f"the machine was busy during {busy} of {len(document['rows'])} rows: their figures mean little")
    if any(not row["headline"] and row["red"] is None for row in document["rows"]):
        lines.append("* no headline: a peer that it has to be quoted against is missing")
    reasons = [item for row in document["rows"] for item in row["unavailable"].items()]
    missing = {(name, reason) for name, reason in reasons if name != OURS}
    lines += [f"left out: {name}: {reason}" for name, reason in sorted(missing)]
    return lines


def geomean(values: list[float]) -> float:
    import numpy as np

    return float(np.exp(np.log(values).mean()))


def markdown(document: dict[str, Any]) -> str:
    """All tables, for a file."""
    env = document["environment"]
    who = (env.get("gpu") or env.get("cpu") or {}).get("name") or (env.get("cpu") or {}).get("model", "unknown CPU")
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    text = f"{who}, {env['date'][:10]}, commit {env['commit'] or 'none'}; {packages}. "
    text += "Microseconds per call, interleaved.\n\n"
    text += "".join(f"- {line}\n" for line in notes(document))
    for label, found in groups(document):
        text += f"\n### {label}\n\n{report.markdown_table(COLUMNS, [cells(row) for row in found])}"
    return text
