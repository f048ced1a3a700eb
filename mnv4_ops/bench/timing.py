"""The interleaved clock.

Variants run round robin in one process, in a new random order every round, so that drift of the machine (frequency,
neighbours) hits all of them alike. Thread pools spin for a while after a call (libgomp, pthreadpool, ONNX Runtime,
TBB) and would take a core from the next variant: before each turn the clock waits until the process has gone quiet,
then warms the variant up, which also wakes its own pool.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Run = Callable[[], Any]

_TURN_SECONDS = 0.03  # timed calls of one turn, about
_MAX_BURST = 12
# two ticks at 100 Hz: where the kernel counts the time of running threads by the tick, a spinning one has used none in
# most windows of 2 ms
_QUIET_SLICE = 0.02
_QUIET_LIMIT = 0.4
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Stats:
    """Of the timed calls, in milliseconds."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    min_ms: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Stats:
        q20, median, q80 = np.quantile(np.asarray(seconds) * 1e3, (0.2, 0.5, 0.8))
        return cls(float(median), float(q20), float(q80), min(seconds) * 1e3, len(seconds))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settle() -> None:
    """Waits until no thread of this process is busy any more (a spinning pool counts as busy), at most 0.4 s."""
    deadline = time.perf_counter() + _QUIET_LIMIT
    while time.perf_counter() < deadline:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(_QUIET_SLICE)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - wall):
            return


def _timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    variants: Mapping[str, Run],
    *,
    repeats: int = 15,
    seconds: float = 60.0,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Stats]:
    """Times every variant `repeats` rounds; stops early (but not before three rounds) once `seconds` have passed.

    One turn of a variant: settle, one warm-up call, then timed calls for about 30 ms (1 to 12 of them, fixed per
    variant). `on_round(done, total)` is called after each round.
    """
    generator = random.Random(seed)
    burst: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for name, run in variants.items():
        run()
        # a lone call says too much about the state before it
        once = min(_timed(run) for _ in range(2))
        burst[name] = min(_MAX_BURST, max(1, math.ceil(_TURN_SECONDS / max(once, 1e-7))))
    order = list(variants)
    end = time.perf_counter() + seconds
    for done in range(1, repeats + 1):
        generator.shuffle(order)
        for name in order:
            run = variants[name]
            settle()
            run()
            samples[name].extend(_timed(run) for _ in range(burst[name]))
        if on_round is not None:
            on_round(done, repeats)
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
    return {name: Stats.of(values) for name, values in samples.items()}
