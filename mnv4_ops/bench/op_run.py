"""The whole of `mnv4-ops bench --ops`: every case of some ops, a fresh pinned process per number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mnv4_ops.bench import ceilings, gate, gpu_run, isolate, machine, op_gpu, peers, report, rows
from mnv4_ops.bench import ops as registry
from mnv4_ops.bench import run as cpu_run
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.page import Cell
from mnv4_ops.bench.roofline_report import models_of
from mnv4_ops.spec import MODELS

SCHEMA = "mnv4-ops/ops/1"
OURS = rows.OURS
_METHOD = {
    "gate": "every output is compared first: float32 on the CPU max|d|/max|ref| <= 2e-5, otherwise the 2x rule against "
    "float64 (peers twice that); a wrong one has no time",
    "order": "all variants of a row interleaved in one process, random order per round",
    "turn": "CPU: wait until the process is quiet, one warm-up call, 1 to 12 timed calls; "
    "GPU: replays of a CUDA graph of 1 to 20 calls between events (warm L2), and of one call with a flushed L2",
    "statistics": "median, 20 % and 80 % quantiles, minimum; milliseconds per call of a whole batch",
    "ours": "float32 on the CPU: the native object; otherwise the enabled module",
    "pinning": "a fresh process per number of threads, pinned to as many CPUs",
    "limit": "the larger of 2 x MACs at the FMA peak and bytes (input, weights, output once) at the bandwidth of the "
    "nearest level of memory that holds them, both measured in the same process",
    "best_peer": "the fastest of all peers that passed the gate",
}


# what tells a row from the others of a file
IDENTITY = ("op", "case", "batch", "threads", "dtype", "device")
Key = tuple[Any, ...]


def key(row: Mapping[str, Any]) -> Key:
    """What a row is of, without its figures."""
    return tuple(row[name] for name in IDENTITY)


def _described(item: op_gpu.Item) -> dict[str, Any]:
    name, case, setting = item
    return rows.describe(registry.by_name(name), case, setting)


@dataclass(frozen=True)
class OpsPlan:
    """`models`, `ops` and `peers` as the user wrote them, resolved by `validate`. `blocks` (on a GPU): the blocks of
    the models that are one of `ops`, not the ops inside of them; `limit`: seconds after which no row begins; `known`:
    rows (`key`) that come after all others, since a file has them.
    """

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
    blocks: bool = False
    limit: float | None = None
    known: frozenset[Key] = frozenset()

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
        if self.limit is not None and self.processes > 1:
            raise BenchError("--limit: does not go with --processes: one of them may get further than another")

    def todo(self, threads: int = 1) -> list[op_gpu.Item]:
        """All rows, those that are not `known` first. On a GPU by model: what a limit leaves out is of the last."""
        models = models_of(self.models)
        ops = registry.select(self.ops)
        if self.blocks:
            cases = [(op, case) for op, case in registry.blocks(models, self.resolution) if op in ops]
        else:
            cases = [(op, case) for op in ops for case in op.cases(models, self.resolution)]
            if self.device == "cuda":
                cases.sort(key=lambda item: models.index(item[1].places[0].split()[0]))
        items = [
            (op.name, case, rows.Setting(batch, threads, dtype, self.device))
            for op, case in cases
            for dtype in self.dtypes
            for batch in self.batches
        ]
        return sorted(items, key=lambda item: key(_described(item)) in self.known)

    def chosen(self) -> tuple[str, ...]:
        """Names of the peers; `all` leaves out those that take minutes to prepare."""
        here = rows.peers_of(self.device)
        known = [peer.name for peer in here]
        groups = {"all": [peer.name for peer in here if not peer.slow], "torch": peers.of_torch(known)}
        return peers.named(self.peers, known, groups, f" for ops on {self.device}")


@dataclass(frozen=True)
class OpsRequest:
    """What one process measures on the CPU: rows in this order, none begun after `until` (seconds since the epoch)."""

    todo: tuple[op_gpu.Item, ...]
    peers: tuple[str, ...]
    threads: int
    repeats: int = 7
    seconds: float = 1.5
    until: float = float("inf")


def measure_ops(request: OpsRequest, notify: isolate.Notify) -> dict[str, Any]:
    """Ceilings of the machine and all rows; each is an event too. Meant for a fresh process (`isolate.run`)."""
    import torch

    torch.set_num_threads(request.threads)
    notify({"stage": "load"})
    precisions = dict.fromkeys(setting.dtype for _, _, setting in request.todo if setting.dtype != "float32")
    limits = ceilings.measure(request.threads, precisions=tuple(precisions))
    notify({"stage": "ceilings", "ceilings": limits.as_dict()})
    measured: list[dict[str, Any]] = []
    for index, (name, case, setting) in enumerate(request.todo):
        if time.time() > request.until:
            break
        notify({"stage": "block", "name": f"{name} {case.name}", "done": index, "total": len(request.todo)})
        how: dict[str, Any] = {"repeats": request.repeats, "seconds": request.seconds, "ceilings": limits}
        measured.append(rows.measure(registry.by_name(name), case, setting, request.peers, **how))
        notify({"stage": "row", "row": measured[-1], "done": index + 1, "total": len(request.todo)})
    return {"ceilings": limits.as_dict(), "rows": measured}


def run(plan: OpsPlan, console: Console, save: Callable[[dict[str, Any]], None] | None = None) -> cpu_run.Outcome:
    """Tables on the console; `ok` is False when a row was red. `save` gets the document after each row."""
    environment = machine.environment() if plan.device == "cpu" else gpu_run.environment()
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "method": {**_METHOD, "seconds": 0},
        "ceilings": [],
        "rows": [],
    }
    start = time.perf_counter()
    measure = _on_cpu if plan.device == "cpu" else _on_gpu
    measure(plan, console, document, save or (lambda document: None))
    document["method"] = {**_METHOD, "seconds": round(time.perf_counter() - start)}
    if plan.processes > 1:
        document["method"]["processes"] = f"{plan.processes}, of each row the one with the median ratio is shown"
    for view in tables(document):
        console.print(view)
    for line in notes(document):
        console.print(line, markup=False)
    return cpu_run.Outcome(document, markdown(document), all(row["red"] is None for row in document["rows"]))


def _on_cpu(plan: OpsPlan, console: Console, document: dict[str, Any], save: Any) -> None:
    end = time.time() + (float("inf") if plan.limit is None else plan.limit)
    left: list[op_gpu.Item] = []
    for threads in plan.threads:
        todo = plan.todo(threads)
        if time.time() > end:
            left += todo
            continue
        request = OpsRequest(tuple(todo), plan.chosen(), threads, plan.repeats, plan.seconds, end)
        label = f"ops, {report.threads_text(threads)}"
        before = len(document["rows"])

        def on_event(event: dict[str, Any]) -> None:
            if event["stage"] == "ceilings":
                document["ceilings"].append(event["ceilings"])
            elif event["stage"] == "row":
                document["rows"].append(event["row"])
                save(document)

        # of several processes the rows are known when all have ended
        once = on_event if plan.processes == 1 else None
        try:
            runs = range(plan.processes)
            found = [cpu_run.run_cell(measure_ops, request, label, console, threads, on_event=once) for _ in runs]
        except RuntimeError as error:
            raise BenchError(f"{label}: the measuring process failed: {str(error).splitlines()[-1]}") from error
        if once is None:
            document["ceilings"].append(found[0]["ceilings"])
            same = zip(*(result["rows"] for result in found), strict=True)
            document["rows"] += [cpu_run.middle(list(results), "vs_best_peer") for results in same]
        left += todo[len(document["rows"]) - before :]
    _say_left(document, left)


def _say_left(document: dict[str, Any], left: list[op_gpu.Item]) -> None:
    if left:
        document["not_measured"] = [title(_described(item)) for item in left]


def _on_gpu(plan: OpsPlan, console: Console, document: dict[str, Any], save: Any) -> None:
    if plan.blocks:
        document["blocks"] = True
    order = [op.name for op in registry.OPS]

    def fill(limits: ceilings.Ceilings | None, found: list[dict[str, Any]]) -> None:
        document["ceilings"] = [] if limits is None else [limits.as_dict()]
        document["rows"] = sorted(found, key=lambda row: order.index(row["op"]))
        save(document)

    limits, found, left = op_gpu.collect(
        plan.todo(), plan.chosen(), console, repeats=plan.repeats, seconds=plan.seconds, limit=plan.limit, on_row=fill
    )
    _say_left(document, left)
    fill(limits, found)


_COLUMNS = ("case", "batch", "threads", "dtype", "mnv4_ops us", "20 - 80 %", "of limit", "bound", "best peer us",
            "vs best")  # fmt: skip
_GPU_COLUMNS = ("case", "batch", "dtype", "MB", "GFLOP", "mnv4_ops us", "20 - 80 %", "cold L2 us", "limit us",
                "of limit", "bound", "torch.compile us", "best peer us", "vs best")  # fmt: skip
# the peer with a column of its own on a GPU
_COMPILED = "compile_graph"


AGAINST_PEERS = "Every peer: its time over that of mnv4_ops (geometric mean of the rows that it ran in)"


def title(row: dict[str, Any]) -> str:
    """A row in words, as it stands in `not_measured`."""
    threads = f"{report.threads_text(row['threads'])}, " if row["device"] == "cpu" else ""
    return f"{row['op']} {row['case']}, batch {row['batch']}, {threads}{row['dtype']}"


def columns(found: list[dict[str, Any]]) -> tuple[str, ...]:
    """Headings of a table of rows, which are all of one device."""
    return _GPU_COLUMNS if found[0]["device"] == "cuda" else _COLUMNS


def groups(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(label of an op, its rows) in the order of the file."""
    labels = {op.name: op.label for op in registry.OPS}
    names = list(dict.fromkeys(row["op"] for row in document["rows"]))
    return [(labels.get(name, name), [row for row in document["rows"] if row["op"] == name]) for name in names]


def settings(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """`groups`, each by its numbers of threads where the file has several: what means are taken of."""
    counts = sorted({row["threads"] for row in document["rows"]})
    if len(counts) < 2:
        return groups(document)
    return [
        (f"{label}, {report.threads_text(count)}", same)
        for label, found in groups(document)
        for count in counts
        if (same := [row for row in found if row["threads"] == count])
    ]


def cells(row: dict[str, Any], labels: Mapping[str, str] | None = None) -> list[Cell]:
    """The cells of a row for `columns`; `labels` name the peers."""
    gpu, variants = row["device"] == "cuda", row["variants"]
    head = [Cell(row["case"]), Cell.number(row["batch"], "d")]
    head += [] if gpu else [Cell.number(row["threads"], "d")]
    head.append(Cell(row["dtype"]))
    if gpu:
        head += [Cell.number(row["bytes"] / 1e6, ".2f"), Cell.number(2 * row["macs"] / 1e9, ".3f")]
    if row["red"] is not None:
        empty = len(columns([row])) - len(head) - 1
        return [*head, Cell(f"red: {row['red']}", None, "bad"), *[Cell("")] * empty]
    ours, best = variants[OURS], row["best_peer"]
    times = [_micros(ours), Cell(f"{1e3 * ours['q20_ms']:.1f} - {1e3 * ours['q80_ms']:.1f}")]
    if gpu:
        limit = row.get("limit_ms")
        times += [_micros(ours, "cold_median_ms"), Cell.number(None if limit is None else 1e3 * limit, ".1f")]
    share = ours.get("of_limit")
    times += [Cell.number(None if share is None else 100 * share, ".0f", " %"), Cell(row.get("bound", ""))]
    if gpu:
        times.append(_micros(variants.get(_COMPILED, {})))
    name = (labels or {}).get(best, best)
    times.append(Cell(f"{1e3 * variants[best]['median_ms']:.1f} ({name})" if best else ""))
    return [*head, *times, Cell.against_best(row.get("vs_best_peer"), row["headline"])]


def _micros(facts: dict[str, Any], key: str = "median_ms") -> Cell:
    return Cell.number(1e3 * facts[key] if key in facts else None, ".1f")


def against_peers(
    document: dict[str, Any], labels: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], list[list[Cell]]]:
    """(columns, a row per op): of every peer, the fastest first, its time over ours as a geometric mean of the rows
    that it ran in; `n of` how many where it did not run in all of them.
    """
    good = [row for row in document["rows"] if row["red"] is None]

    def ratios_of(name: str, found: list[dict[str, Any]]) -> list[float]:
        both = [row["variants"] for row in found if name in row["variants"]]
        return [facts[name]["median_ms"] / facts[OURS]["median_ms"] for facts in both]

    names = dict.fromkeys(name for row in good for name in row["variants"] if name != OURS)
    chosen = sorted(names, key=lambda name: geomean(ratios_of(name, good)))
    sorts = [(label, [row for row in found if row["red"] is None]) for label, found in settings(document)]
    table = []
    for label, found in [*sorts, ("all", good)] if len(sorts) > 1 else sorts:
        if not found:
            continue
        cells = [Cell(label), Cell.number(len(found), "d")]
        for name in chosen:
            ratios = ratios_of(name, found)
            few = "" if len(ratios) == len(found) else f" ({len(ratios)} of {len(found)})"
            cells.append(Cell.ratio(geomean(ratios), few) if ratios else Cell(""))
        table.append(cells)
    return ("op", "rows", *((labels or {}).get(name, name) for name in chosen)), table


def tables(document: dict[str, Any]) -> list[Table]:
    views = []
    for label, found in groups(document):
        view = Table(title=label, title_justify="left", title_style="bold")
        for index, column in enumerate(columns(found)):
            view.add_column(column, justify="left" if index == 0 else "right")
        for row in found:
            texts = (cell.text for cell in cells(row))
            view.add_row(*texts, style="bold red" if row["red"] is not None else None)
        views.append(view)
    names, ratios = against_peers(document)
    if ratios and len(names) > 2:
        view = Table(title=AGAINST_PEERS, title_justify="left", title_style="bold")
        for index, column in enumerate(names):
            view.add_column(column, justify="left" if index == 0 else "right")
        for line in ratios:
            view.add_row(*(cell.text for cell in line))
        views.append(view)
    return views


def notes(document: dict[str, Any]) -> list[str]:
    """Lines under the tables: geometric means, ceilings, who was missing."""
    lines = []
    for label, found in settings(document):
        ratios = [row["vs_best_peer"] for row in found if row.get("vs_best_peer") and row["headline"]]
        if ratios:
            won = sum(ratio >= 1 for ratio in ratios)
            mean = f"{geomean(ratios):.2f}x the best peer (geometric mean)"
            lines.append(f"{label}: {mean}, {won} of {len(ratios)} rows >= 1")
    lines += _sums(document)
    for limit in document["ceilings"]:
        peaks = ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in limit["peak_gflops"].items())
        levels = ", ".join(f"{name} {value:.0f}" for name, value in limit["bandwidth_gbs"].items())
        threads = "" if "gpu" in document.get("environment", {}) else f", {report.threads_text(limit['threads'])}"
        lines.append(f"ceilings{threads}: {peaks}; GB/s: {levels}")
    left = document.get("not_measured", [])
    if left:
        lines.append(f"no time for {len(left)} rows: {'; '.join(left[:4])}{' ...' if len(left) > 4 else ''}")
    busy = sum(row.get("preempted_per_call", 0) > report.BUSY for row in document["rows"])
    if busy:
        lines.append(f"the machine was busy during {busy} of {len(document['rows'])} rows: their figures mean little")
    if any(not row["headline"] and row["red"] is None for row in document["rows"]):
        lines.append("* no headline: a peer that it has to be quoted against is missing")
    return lines + _left_out(document)


def _left_out(document: dict[str, Any]) -> list[str]:
    """Of every peer that some rows lack: why, and which ones; wrong answers are one line, with the first of them."""
    missing: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {}
    for row in document["rows"]:
        for name, reason in row["unavailable"].items():
            if name != OURS:
                kind = gate.WRONG if reason.startswith(gate.WRONG) else reason
                missing.setdefault((name, kind), []).append((row, reason))
    labels = {op.name: op.label for op in registry.OPS}
    lines = []
    for (name, _), found in sorted(missing.items(), key=lambda item: item[0]):
        where = f"{len(found)} of {len(document['rows'])} rows"
        ops = dict.fromkeys(labels.get(row["op"], row["op"]) for row, _ in found)
        if len(found) < len(document["rows"]):
            where += f" ({', '.join(ops)})"
        lines.append(f"left out: {name} in {where}: {found[0][1]}")
    return lines


def _sums(document: dict[str, Any]) -> list[str]:
    """Of each model all of whose blocks were measured: their times, one after another."""
    if not document.get("blocks"):
        return []
    lines = []
    settings = {(row["batch"], row["dtype"]): None for row in document["rows"]}
    for model in MODELS:
        expected = {place for _, case in registry.blocks([model]) for place in case.places}
        for batch, dtype in settings:
            same = [row for row in document["rows"] if (row["batch"], row["dtype"]) == (batch, dtype)]
            same = [row for row in same if row["best_peer"] and OURS in row["variants"] and "limit_ms" in row]
            counted = [(row, sum(place in expected for place in row["places"])) for row in same]
            if sum(count for _, count in counted) != len(expected):
                continue
            ours = sum(count * row["variants"][OURS]["median_ms"] for row, count in counted)
            best = sum(count * row["variants"][row["best_peer"]]["median_ms"] for row, count in counted)
            limit = sum(count * row["limit_ms"] for row, count in counted)
            peers = f"the best peer of each {best:.3f} ms ({best / ours:.2f}x)"
            share = f"limit {limit:.3f} ms ({100 * limit / ours:.0f} %)"
            where = f"blocks of {model} one after another, batch {batch}, {dtype}"
            lines.append(f"{where}: {ours:.3f} ms, {peers}, {share}")
    return lines


def geomean(values: list[float]) -> float:
    import numpy as np

    return float(np.exp(np.log(values).mean()))


def markdown(document: dict[str, Any]) -> str:
    """All tables, for a file."""
    env = document["environment"]
    cpu = env.get("cpu") or {}
    who = (env.get("gpu") or {}).get("name") or f"{cpu.get('model', 'unknown CPU')}, tier {cpu.get('tier', 'none')}"
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    text = f"{who}, {env['date'][:10]}, commit {env['commit'] or 'none'}; {packages}. "
    text += "Microseconds per call, interleaved.\n\n"
    text += "".join(f"- {line}\n" for line in notes(document))
    names, ratios = against_peers(document)
    if ratios and len(names) > 2:
        text += f"\n### {AGAINST_PEERS}\n\n"
        text += report.markdown_table(names, [[cell.text for cell in row] for row in ratios])
    for label, found in groups(document):
        texts = [[cell.text for cell in cells(row)] for row in found]
        text += f"\n### {label}\n\n{report.markdown_table(columns(found), texts)}"
    return text
