"""A fresh process per measurement: pinned before any thread pool exists, and a crash costs one cell and not the run."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.machine import pick_cpus, pinned

Notify = Callable[[dict[str, Any]], None]
Task = Callable[[Any, Notify], Any]

_TAIL = 1500


def _child(connection: Connection, log: str, task: Task, request: Any) -> None:
    # exporters and compilers print; the parent owns the terminal
    target = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        connection.send(("result", task(request, lambda event: connection.send(("event", event)))))
    except BenchError as error:
        connection.send(("bench_error", str(error)))
    except KeyboardInterrupt:
        pass
    except BaseException:
        connection.send(("crash", traceback.format_exc()))


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the children that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# variables and affinity are the parent's own while a child starts
_starting = threading.Lock()


def run(
    task: Task,
    request: Any,
    *,
    threads: int,
    notify: Notify,
    compilers: int = 1,
    cpus: list[int] | None = None,
    patience: float | None = None,
) -> Any:
    """Result of `task(request, notify)` in a fresh process pinned to `threads` CPUs. `task` is a module-level function.

    `compilers` is the number of processes that torch.compile may use: 1 leaves none beside a measurement on the CPU.
    `cpus`: where it may run, instead of as many as threads. `patience`: so many seconds without an event end it.
    Raises BenchError for one that the task raised, RuntimeError (with the end of the child's output) for anything else.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(compilers),
    }
    with tempfile.NamedTemporaryFile(prefix="mnv4_ops-bench-", suffix=".log") as log:
        process = context.Process(target=_child, args=(theirs, log.name, task, request), daemon=compilers == 1)
        with _starting, pinned(cpus or pick_cpus(threads)), environment(variables):
            process.start()
        theirs.close()
        kind: str = "interrupted"
        value: Any = None
        try:
            while True:
                try:
                    if not ours.poll(patience):
                        kind, value = "crash", f"nothing was heard of the process for {patience:.0f} s"
                        break
                    kind, value = ours.recv()
                except EOFError:
                    process.join()
                    kind, value = "crash", f"the process ended with exit code {process.exitcode}"
                if kind == "event":
                    notify(value)
                    continue
                break
        finally:
            # a finished child may hold thread pools that will not join; an interrupted one is not waited for
            process.join(5 if kind == "result" else 0)
            process.terminate()
            process.join(10)
        if kind == "result":
            return value
        if kind == "bench_error":
            raise BenchError(value)
        with open(log.name, errors="replace") as output:
            tail = output.read()[-_TAIL:].strip()
    raise RuntimeError(f"{value.strip()}\n{tail}".strip())
