"""The rows of a GPU: many processes compile everything, then one measures row by row.

torch.compile takes seconds a block. Its caches are on disk, so workers go through all rows up to the clock, and the
process that measures finds what they left. A row that ends its process, or leaves a device that answers nothing any
more, is lost alone: the rows after it run in a new process.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mnv4_ops.bench import ceilings, isolate, machine, rows
from mnv4_ops.bench import ops as registry
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.ops import Case

Item = tuple[str, Case, rows.Setting]
Event = Callable[[dict[str, Any]], None]

# of the time allowed, for compiling
_PREPARING = 0.45
_MOST_WORKERS = 15
# a process of which nothing is heard for so long hangs; sooner when it should have come to its end
_PATIENCE_SECONDS = 150.0
_GRACE_SECONDS = 40.0
_BARREN_STARTS = 3
_FOREVER = 1e12


@dataclass(frozen=True)
class Request:
    """What one process does: rows in this order, none begun after `until` (seconds since the epoch)."""

    todo: tuple[Item, ...]
    peers: tuple[str, ...]
    repeats: int
    seconds: float
    until: float
    limits: ceilings.Ceilings | None = None


def _alive() -> bool:
    """Frees what the last row left; False if the device answers nothing any more."""
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def prepare_rows(request: Request, notify: isolate.Notify) -> bool:
    """Compiles what the rows need, peers and ours; False if a new process has to go on."""
    import torch

    for op, case, setting in request.todo:
        if time.time() > request.until:
            break
        try:
            with torch.inference_mode():
                rows.prepare(registry.by_name(op), case, setting, request.peers)
        except Exception as error:  # the process that measures says so in the row
            print(f"{op} {case.name}: {error}", flush=True)
        notify({"stage": "done"})
        if not _alive():
            return False
    return True


def measure_rows(request: Request, notify: isolate.Notify) -> bool:
    """Measures; every row is an event of its own. False if a new process has to go on."""
    limits = request.limits
    if limits is None:
        limits = ceilings.measure_gpu(tuple(dict.fromkeys(setting.dtype for _, _, setting in request.todo)))
        notify({"stage": "ceilings", "limits": limits})
    for name, case, setting in request.todo:
        if time.time() > request.until:
            break
        op = registry.by_name(name)
        how: dict[str, Any] = {"repeats": request.repeats, "seconds": request.seconds, "ceilings": limits}
        try:
            row = rows.measure(op, case, setting, request.peers, **how)
        except Exception as error:
            row = rows.lost(op, case, setting, f"{type(error).__name__}: {error}".splitlines()[0][:200])
        notify({"stage": "done", "row": row})
        if not _alive():
            return False
    return True


def _go_on(task: Any, request: Request, on_event: Event, on_lost: Callable[[Item, str], None], *, threads: int) -> None:
    """Runs a task over its rows in as many processes as it takes: one that ends without an answer loses the row that
    it was at.
    """
    todo, barren = request.todo, 0
    while todo and time.time() < request.until:
        done = 0

        def notify(event: dict[str, Any]) -> None:
            nonlocal done
            on_event(event)
            done += event["stage"] == "done"

        rest = replace(request, todo=todo)
        patience = min(_PATIENCE_SECONDS, request.until - time.time() + _GRACE_SECONDS)
        cpus = machine.available_cpus()
        try:
            if isolate.run(task, rest, threads=threads, notify=notify, cpus=cpus, patience=patience):
                return
        except (RuntimeError, BenchError) as error:
            reason = f"the measuring process failed: {str(error).splitlines()[-1][:200]}"
            barren = 0 if done else barren + 1
            # nothing of it works: no use in starting once for each row
            count = len(todo) if barren == _BARREN_STARTS else 1
            for item in todo[done : done + count]:
                on_lost(item, reason)
            done += count
        todo = todo[done:]


@contextmanager
def _compiler_caches() -> Iterator[Path]:
    """One folder of compiled code for all processes of a run; thrown away unless the environment names one."""
    variables = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    with tempfile.TemporaryDirectory(prefix="mnv4_ops-inductor-", ignore_cleanup_errors=True) as folder:
        own = os.environ.get("TORCHINDUCTOR_CACHE_DIR", folder)
        with isolate.environment(variables | {"TORCHINDUCTOR_CACHE_DIR": own}):
            yield Path(own)


def _prepare(request: Request, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for index in range(workers):
            part = replace(request, todo=request.todo[index::workers])
            pool.submit(_go_on, prepare_rows, part, lambda event: None, lambda *lost: None, threads=1)


def collect(
    todo: Sequence[Item],
    peers: tuple[str, ...],
    console: Console,
    *,
    repeats: int,
    seconds: float,
    limit: float | None = None,
    on_row: Callable[[ceilings.Ceilings | None, list[dict[str, Any]]], None] = lambda limits, rows: None,
) -> tuple[ceilings.Ceilings | None, list[dict[str, Any]], list[Item]]:
    """(ceilings of the device, rows in the order of `todo`, what `limit` seconds did not suffice for).

    `on_row` gets the ceilings and all rows so far whenever there is one more.
    """
    start = time.time()
    end = start + (limit or _FOREVER)
    found: list[dict[str, Any]] = []
    limits: ceilings.Ceilings | None = None
    request = Request(tuple(todo), peers, repeats, seconds, min(end, start + _PREPARING * (limit or _FOREVER)))
    cpus = len(machine.available_cpus())
    workers = max(1, min(cpus - 1, _MOST_WORKERS, len(todo)))

    def on_event(event: dict[str, Any]) -> None:
        nonlocal limits
        limits = event.get("limits", limits)
        if "row" in event:
            add(event["row"])

    def add(row: dict[str, Any]) -> None:
        found.append(row)
        on_row(limits, found)
        console.print(f"{time.time() - start:5.0f} s {len(found)}/{len(todo)} {_line(row)}", markup=False)

    def on_lost(item: Item, reason: str) -> None:
        op, case, setting = item
        add(rows.lost(registry.by_name(op), case, setting, reason))

    with _compiler_caches() as folder:
        if workers > 1:
            console.print(f"{workers} processes compile {len(todo)} rows")
            _prepare(request, workers)
            # configurations chosen while others used the device: chosen again by the one that measures
            for file in folder.rglob("*.best_config"):
                file.unlink()
            console.print(f"{time.time() - start:5.0f} s compiled")
        measuring = replace(request, until=end)
        _go_on(measure_rows, measuring, on_event, on_lost, threads=cpus)
    known = {(row["op"], row["case"], row["batch"], row["dtype"]) for row in found}
    left = [item for item in todo if (item[0], item[1].name, item[2].batch, item[2].dtype) not in known]
    return limits, found, left


def _line(row: dict[str, Any]) -> str:
    head = f"{row['op']} {row['case']}, batch {row['batch']}, {row['dtype']}"
    if row["red"] is not None:
        return f"{head}: red: {row['red']}"
    ratio = row.get("vs_best_peer")
    against = f", {ratio:.2f}x {row['best_peer']}" if ratio else ""
    return f"{head}: {1e3 * row['variants'][rows.OURS]['median_ms']:.1f} us{against}"
