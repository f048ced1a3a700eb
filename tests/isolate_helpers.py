"""What a fresh process runs in the tests: importable there by name, since pytest puts this folder on the path."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from mnv4_ops.bench import isolate, machine
from mnv4_ops.bench.errors import BenchError


def say(request: str, notify: isolate.Notify) -> Any:
    notify({"said": request})
    if request == "bench_error":
        raise BenchError("that was wrong")
    if request == "crash":
        os.write(1, b"last words\n")
        os._exit(9)
    if request == "hang":
        time.sleep(60)
    return len(machine.available_cpus()), torch.get_num_threads()
