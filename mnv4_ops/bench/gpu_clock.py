"""The clock of the device: replays of CUDA graphs between events, variants interleaved."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from mnv4_ops.bench.timing import Stats

# replays between two events, about: short ones drown in the resolution of the events
_SPAN_SECONDS = 2e-3
_SPANS = 5
_MIN_ROUNDS = 3


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Captures a call after a warm-up on a side stream; the result replays it and returns the graph's own output.

    It keeps what `run` holds: a graph goes on reading the weights of a model that is gone.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay(_kept: Any = run) -> Any:
        graph.replay()
        return output

    return replay


def span(run: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` runs in a row, by the clock of the device."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / count


_FLUSH_BYTES = 256 * 2**20


def cold_span(run: Callable[[], Any], count: int) -> float:
    """As `span`, but before each run the L2 is filled with something else, outside of the clock."""
    import torch

    other = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    total = 0.0
    for _ in range(count):
        other.zero_()
        total += span(run, 1)
    return total / count


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    seconds: float = 20.0,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    span: Callable[[Callable[[], Any], int], float] = span,
) -> dict[str, Stats]:
    """Times every variant `rounds` rounds in a new random order each; stops early (but not before three rounds) once
    `seconds` have passed. One turn: one warm-up run, then five spans of about 2 ms each. `span` is the clock.
    """
    generator = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    counts = {}
    for name, run in variants.items():
        span(run, 2)
        counts[name] = min(200, max(1, math.ceil(_SPAN_SECONDS / max(span(run, 2), 1e-7))))
    order = list(variants)
    end = time.perf_counter() + seconds
    for done in range(1, rounds + 1):
        generator.shuffle(order)
        for name in order:
            span(variants[name], 1)
            samples[name].extend(span(variants[name], counts[name]) for _ in range(_SPANS))
        if on_round is not None:
            on_round(done, rounds)
        if done >= _MIN_ROUNDS and time.perf_counter() > end:
            break
    return {name: Stats.of(values) for name, values in samples.items()}
