"""Which cores a measurement runs on, and what every result row says about the machine."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnv4_ops.bench.errors import BenchError

_CPU = Path("/sys/devices/system/cpu")


def available_cpus() -> list[int]:
    """Logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read(cpu: int, name: str, default: str) -> str:
    try:
        return (_CPU / f"cpu{cpu}" / name).read_text().strip()
    except OSError:
        return default


def pick_cpus(threads: int) -> list[int]:
    """`threads` CPUs to measure on: one per physical core before any sibling, big before little, high numbers first.

    Interrupts land on CPU 0 more often than on others. Raises BenchError if the process may not use as many.
    """
    cpus = available_cpus()
    if threads > len(cpus):
        raise BenchError(f"--threads: expected at most {len(cpus)} (the CPUs this process may run on), got {threads}")
    seen: set[str] = set()
    ranked = []
    for cpu in reversed(cpus):
        core = _read(cpu, "topology/core_cpus_list", str(cpu))
        ranked.append((core in seen, -int(_read(cpu, "cpu_capacity", "0")), cpu))
        seen.add(core)
    ranked.sort(key=lambda item: item[:2])
    return sorted(cpu for _, _, cpu in ranked[:threads])


@contextmanager
def pinned(cpus: list[int]) -> Iterator[None]:
    """Child processes started inside inherit the CPUs; the calling thread gets its own back afterwards. No-op on
    macOS.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def commit() -> str | None:
    """Commit of the source tree that the package is imported from (with + if it has local changes); None for an
    installed copy.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        # an installed copy may lie inside somebody else's repository
        own = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if head.returncode or own.returncode:
            return None
        # results written beside the code change no code
        code = [":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True, timeout=30
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """Facts of this machine and installation that belong to every result (no host name, no paths of the user)."""
    from mnv4_ops import _info

    info = _info.collect()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "mnv4_ops": info["version"],
        "python": info["python"],
        "platform": info["platform"],
        "packages": {name: version for name, version in info["packages"].items() if version},
        "cpu": info["cpu"],
        "cpus": available_cpus(),
        "build": info["native"]["build"],
    }


def involuntary_switches() -> int:
    """How often a thread of this process was put off a CPU so far; many in a timed section mean a busy machine."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def fma_peak(threads: int) -> float | None:
    """Measured fp32 FMA peak of `threads` cores in GFLOP/s, or None where the native library cannot say."""
    from mnv4_ops import _native

    measure = getattr(_native.core, "fma_peak", None)
    return float(measure(threads)) if measure is not None else None
