"""What this machine can do at best, measured: FMA peaks per precision and copy bandwidth per level of memory.

Every result row is quoted as a fraction of the limit that follows: the larger of its multiply-accumulates at the peak
and its bytes (input, weights and output once) at the bandwidth of the level that holds them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mnv4_ops.bench import machine

LEVELS = ("L1", "L2", "L3", "DRAM")
_DEFAULT_CACHES = {"l1d": 32 * 2**10, "l2": 2**20, "l3": 32 * 2**20}
_DRAM_BYTES = 192 * 2**20
# one call of numpy moves about this much, so that the call itself does not count
_CALL_BYTES = 48 * 2**20


@dataclass(frozen=True)
class Ceilings:
    """Of `threads` cores together. `peak_gflops` by dtype, `bandwidth_gbs` by level (bytes read and written, 1e9 a
    second), `capacity` the bytes that a level holds (of all cores together; DRAM has none).
    """

    threads: int
    peak_gflops: dict[str, float]
    bandwidth_gbs: dict[str, float]
    capacity: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def ridge(self, dtype: str = "float32") -> float:
        """Ridge point against DRAM in MACs per byte."""
        return self.peak_gflops[dtype] / 2 / self.bandwidth_gbs["DRAM"]

    def level(self, size: int) -> str:
        """The nearest level of memory that holds `size` bytes."""
        return next((name for name in LEVELS[:-1] if size <= self.capacity[name]), "DRAM")

    def limit_ms(self, macs: int, size: int, dtype: str = "float32") -> tuple[float, str] | None:
        """(least milliseconds, `compute` or the level that bounds) of a call; None without a peak of that dtype."""
        peak = self.peak_gflops.get(dtype)
        if not peak:
            return None
        level = self.level(size)
        compute, memory = 2 * macs / peak / 1e6, size / self.bandwidth_gbs[level] / 1e6
        return (compute, "compute") if compute >= memory else (memory, level)


def _aligned(words: int) -> np.ndarray:
    whole = np.ones(words + 16, np.float32)
    start = -whole.ctypes.data % 64 // 4
    return whole[start : start + words]


def _copier(size: int) -> Any:
    """A call that copies (and negates: numpy's vector loop, where memcpy is slow below DRAM) `size` bytes many times
    over, and the bytes that it reads and writes.
    """
    words = max(size // 4, 16)
    times = max(1, _CALL_BYTES // size)
    # a stride of 0: the same bytes once more in one call
    source, target = (np.lib.stride_tricks.as_strided(_aligned(words), (times, words), (0, 4)) for _ in range(2))
    return (lambda: np.negative(source, out=target)), 2 * words * 4 * times


def copy_bandwidth(size: int, threads: int = 1, seconds: float = 0.12) -> float:
    """Bytes read and written per second / 1e9, each thread between two buffers of `size` bytes of its own."""
    rates: list[float] = []
    barrier = threading.Barrier(threads)

    def work() -> None:
        copy, moved = _copier(size)
        copy()
        barrier.wait()
        best, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            copy()
            best = max(best, moved / (time.perf_counter() - start))
        rates.append(best / 1e9)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def matmul_peak(dtype: str, threads: int, side: int = 768, seconds: float = 0.3) -> float | None:
    """GFLOP/s of torch's own matrix product, best of several; None where torch has none of that dtype."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(side, side, dtype=getattr(torch, dtype))
        out = a @ a
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            best = min(best, time.perf_counter() - start)
    except RuntimeError:
        return None
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / best / 1e9


def capacities(threads: int) -> dict[str, int]:
    """Bytes that each level of cache holds for `threads` cores (L3 is shared)."""
    from mnv4_ops import _native

    known = _native.core.cpu_info() if _native.core is not None else {}
    l1d, l2, l3 = (int(known.get(name) or _DEFAULT_CACHES[name]) for name in ("l1d", "l2", "l3"))
    return {"L1": threads * l1d, "L2": threads * l2, "L3": max(l3, threads * l2)}


def measure(threads: int = 1, *, precisions: tuple[str, ...] = ("bfloat16", "float16")) -> Ceilings:
    """Takes about two seconds. fp32: the FMA peak of the kernel tier in force; other precisions: torch's matrix
    product, which is a measured rate and no bound of the silicon.
    """
    capacity = capacities(threads)
    # source and target together fill three quarters of a core's cache, half of the shared one
    shares = {"L1": 3 / 8, "L2": 3 / 8, "L3": 1 / 4}
    sizes = {name: int(capacity[name] / threads * share) // 64 * 64 for name, share in shares.items()}
    sizes["DRAM"] = _DRAM_BYTES // threads
    bandwidth = {name: copy_bandwidth(size, threads) for name, size in sizes.items()}
    peaks = {"float32": machine.fma_peak(threads) or matmul_peak("float32", threads)}
    peaks |= {dtype: matmul_peak(dtype, threads) for dtype in precisions}
    return Ceilings(threads, {name: peak for name, peak in peaks.items() if peak}, bandwidth, capacity)


def measure_gpu(dtypes: tuple[str, ...], side: int = 8192, size: int = 2**30, device: str = "cuda") -> Ceilings:
    """Rates of the current GPU by the clock of the device: torch's matrix product of `side` squared per dtype, copies
    of `size` bytes in device memory, and copies within the L2.
    """
    import torch

    from mnv4_ops.bench import gpu_clock

    peaks = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        out = torch.empty_like(a)
        run = _bind(torch.mm, a, a, out=out)
        gpu_clock.span(run, 2)
        peaks[dtype] = 2 * side**3 / min(gpu_clock.span(run, 5) for _ in range(5)) / 1e9
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = _bind(target.copy_, source)
    gpu_clock.span(copy, 2)
    levels = {"DRAM": 2 * size / min(gpu_clock.span(copy, 5) for _ in range(5)) / 1e9}
    capacity = dict.fromkeys(LEVELS[:-1], 0)
    if torch.device(device).type == "cuda":
        capacity["L2"] = int(torch.cuda.get_device_properties(device).L2_cache_size)
        # both buffers together fill half of it
        part = capacity["L2"] // 4
        small = gpu_clock.captured(_bind(target[:part].copy_, source[:part]), several=True)
        levels["L2"] = 2 * part / min(gpu_clock.span(small, 100) for _ in range(5)) / 1e9
    return Ceilings(1, peaks, {name: levels[name] for name in LEVELS if name in levels}, capacity)


def _bind(function: Any, *args: Any, **options: Any) -> Any:
    return lambda: function(*args, **options)
