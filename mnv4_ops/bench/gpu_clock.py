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
# of a graph of several calls
_GRAPH_SECONDS = 1e-4
_MOST_CALLS = 20


class Replay:
    """Replays a captured call and returns the graph's own output.

    `several`, if it has one, replays a graph of `calls` such calls in a row: starting a graph costs the host some
    microseconds, more than a small block takes, and `span` should see the device.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        # a graph goes on reading the weights of a model that is gone
        self.run = run
        self.graph, self.output = _graph_of(run, 1)
        self.calls = 1
        self.several: Callable[[], Any] = self.graph.replay

    def __call__(self) -> Any:
        self.graph.replay()
        return self.output

    def repeat(self) -> None:
        """Makes `several`, of about a tenth of a millisecond."""
        self.calls = min(_MOST_CALLS, math.ceil(_GRAPH_SECONDS / max(span(self, 3), 1e-7)))
        if self.calls > 1:
            self.several = _graph_of(self.run, self.calls)[0].replay


def captured(run: Callable[[], Any], *, several: bool = False) -> Replay:
    """Captures a call after a warm-up on a side stream; `several`: also many of it in one graph, for `span`."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    replay = Replay(run)
    if several:
        replay.repeat()
    return replay


def _graph_of(run: Callable[[], Any], calls: int) -> tuple[Any, Any]:
    """(graph of so many calls, output of the last)."""
    import torch

    graph = torch.cuda.CUDAGraph()
    output = None
    with torch.cuda.graph(graph):
        for _ in range(calls):
            # the memory of the one before is free for the next
            output = None
            output = run()
    return graph, output


def span(run: Callable[[], Any], count: int) -> float:
    """Seconds of one of about `count` runs in a row, by the clock of the device."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    calls, turn = (run.calls, run.several) if isinstance(run, Replay) else (1, run)
    turns = math.ceil(count / calls)
    start.record()
    for _ in range(turns):
        turn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (turns * calls)


_FLUSH_BYTES = 256 * 2**20
_COLD_RUNS = 10


def cold_span(run: Callable[[], Any], count: int) -> float:
    """As `span`, but of single runs (at most ten), before each of which the L2 is filled with something else, outside
    of the clock.
    """
    import torch

    other = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    count, total = min(count, _COLD_RUNS), 0.0
    for _ in range(count):
        other.zero_()
        # as a plain call: one replay of one call
        total += span(lambda: run(), 1)
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
