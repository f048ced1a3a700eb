"""Whole models on a GPU: one (model, batch, dtype), all variants in one process.

Two clocks, reported apart. *Graphs*: every variant is captured into a CUDA graph and its replays are timed by events,
interleaved; this is what the device needs. *Calls*: as a user calls it, host wall clock with a synchronise after each
call, interleaved; this adds what the host needs. An output must first pass the 2x rule against float64.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mnv4_ops.bench import cell as cpu_cell
from mnv4_ops.bench import gpu_clock, inputs, timing
from mnv4_ops.bench import peers as registry
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.isolate import Notify

OURS, OURS_GRAPHS = "mnv4_ops", "mnv4_ops_graphs"
# name -> label; what is timed as a graph, and what as a call
GRAPHS = {peer.name: peer.label for peer in registry.GPU_PEERS if peer.captured} | {OURS: "mnv4_ops + CUDA graph"}
CALLS = {peer.name: peer.label for peer in registry.GPU_PEERS if not peer.captured} | {
    OURS: "mnv4_ops.enable()",
    OURS_GRAPHS: "mnv4_ops.enable(cuda_graphs=True)",
}
DTYPES = ("float16", "bfloat16", "float32")
PEERS = tuple(peer.name for peer in registry.GPU_PEERS)
# of the error that the 2x rule allows us; torch.compile keeps other intermediates in fp32 than eager does
PEER_SLACK = 2.0
_CHUNK = 16
_COLD_ROUNDS = 5


@dataclass(frozen=True)
class GpuRequest:
    """`weights_note` is empty for pretrained weights and says otherwise why they are random; `peers` are names."""

    model: str
    batch: int
    dtype: str = "float16"
    resolution: int | None = None
    image: str | None = None
    peers: tuple[str, ...] = PEERS
    weights_note: str = ""
    rounds: int = 20
    seconds: float = 20.0


def _device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def _batch(request: GpuRequest, model: Any, side: int) -> tuple[Any, str]:
    """float32 images on the host, and what they are."""
    import torch

    try:
        photo = inputs.photograph(request.image)
    except BenchError:
        if request.image is not None:
            raise
        generator = torch.Generator().manual_seed(0)
        return torch.randn(request.batch, 3, side, side, generator=generator), "random numbers"
    images = inputs.photo_batch(photo, model, batch=request.batch, resolution=side)
    return images, request.image or inputs.PHOTOGRAPH


def _truth(model: Any, x: Any) -> Any:
    import torch

    double = copy.deepcopy(model).double()
    return torch.cat([double(part.double()) for part in x.split(_CHUNK)])


def judge(output: Any, plain: Any, truth: Any, slack: float = 1.0) -> dict[str, Any]:
    """Error of an output as a fraction of what the 2x rule allows (times `slack`), and whether the classes are alike.

    `plain` is the output of eager torch in the same dtype, `truth` that in float64.
    """
    from mnv4_ops.check import of_allowed

    error = max(of_allowed(output, plain, truth)) / slack
    top1 = (output.argmax(1) == truth.argmax(1)).double().mean().item()
    plain_top1 = (plain.argmax(1) == truth.argmax(1)).double().mean().item()
    # written so that NaN fails
    return {"of_allowed": error, "top1": top1, "eager_top1": plain_top1, "ok": error <= 1}


class _Variants:
    """Makes the callables of a cell; each is `() -> output`."""

    def __init__(self, model: Any, x: Any) -> None:
        import torch

        self.torch, self.model, self.x = torch, model, x
        self.nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self.x_nhwc = x.to(memory_format=torch.channels_last)

    def call(self, name: str) -> Callable[[], Any]:
        if not name.startswith(OURS):
            return registry.by_name(name).prepare(self.model, self.x, 1)
        import mnv4_ops

        model = copy.deepcopy(self.nhwc)
        _enable(lambda: mnv4_ops.enable(model, cuda_graphs=name == OURS_GRAPHS))
        return lambda: model(self.x_nhwc)

    def graph(self, name: str) -> Callable[[], Any]:
        """The replay of a captured call; returns the graph's own output."""
        return gpu_clock.captured(self.call(name))


def _enable(switch: Callable[[], Any]) -> None:
    """Turns kernels on without throwing away what torch has compiled: that is of other models, from before."""
    from mnv4_ops import patch

    forget = patch._forget_compiled
    patch._forget_compiled = lambda: None
    try:
        switch()
    finally:
        patch._forget_compiled = forget


def _peak_bytes(run: Callable[[], Any], before: int, x: Any) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    out = run()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before + x.nbytes


def _memory(variants: _Variants) -> dict[str, int]:
    """Peak bytes of a forward without the model's own weights: input, activations, output, and our packed weights."""
    import gc

    import mnv4_ops

    torch = variants.torch
    x, result = variants.x_nhwc, {}
    for name in ("eager_cl", OURS):
        model = copy.deepcopy(variants.nhwc)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        if name == OURS:
            _enable(lambda model=model: mnv4_ops.enable(model))  # type: ignore[misc]
        model(x)
        result[name] = _peak_bytes(lambda model=model: model(x), before, x)  # type: ignore[misc]
    _enable(mnv4_ops.disable)
    gc.collect()
    return result


def measure(request: GpuRequest, notify: Notify) -> dict[str, Any]:
    """Gate, then both clocks. Meant for a fresh process (`isolate.run`); a JSON-ready dict."""
    import torch

    from mnv4_ops.check_gpu import ieee

    warnings.filterwarnings("ignore", category=FutureWarning)
    cpu_cell.strict_where_kernels_are_expected(request.model)
    notify({"stage": "load"})
    device = _device()
    model = inputs.load_model(request.model, pretrained=not request.weights_note)
    side = inputs.resolution_of(request.model, request.resolution)
    images, source = _batch(request, model, side)
    dtype = getattr(torch, request.dtype)
    model, x = model.to(device, dtype), images.to(device, dtype)
    cell: dict[str, Any] = {
        **{key: value for key, value in asdict(request).items() if key in ("model", "batch", "dtype")},
        "resolution": side,
        "weights": "random, seeded" if request.weights_note else "pretrained",
        "input": source,
        "graphs": {},
        "calls": {},
        "unavailable": {},
        "memory": {},
        "red": None,
    }
    # fp32 is measured as torch comes, TF32 in convolutions
    with torch.inference_mode():
        with ieee():
            truth = _truth(model, x)
        plain = model(x)
        variants = _Variants(model, x)
        graphs, calls = _prepare(cell, request, variants, plain, truth, notify)
        if cell["red"]:
            return cell
        cell["served"] = _served(variants)
        timed = gpu_clock.interleave(
            graphs,
            rounds=request.rounds,
            seconds=request.seconds,
            on_round=lambda done, total: notify({"stage": "round", "done": done, "total": total}),
        )
        _store(cell["graphs"], timed)
        cold = gpu_clock.interleave(graphs, rounds=_COLD_ROUNDS, seconds=request.seconds / 4, span=gpu_clock.cold_span)
        for name, values in cold.items():
            cell["graphs"][name]["cold_median_ms"] = values.median_ms
        _store(cell["calls"], timing.interleave(calls, repeats=request.rounds, seconds=request.seconds))
        for kind, runs in (("graphs", graphs), ("calls", calls)):
            if OURS in runs and not judge(runs[OURS](), plain, truth)["ok"]:
                cell["red"] = f"the enabled model is wrong after the timed runs ({kind})"
        graphs.clear()
        calls.clear()
        notify({"stage": "prepare", "peer": "memory"})
        cell["memory"] = _memory(variants)
    return _derive(cell)


def _prepare(
    cell: dict[str, Any], request: GpuRequest, variants: _Variants, plain: Any, truth: Any, notify: Notify
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    import torch

    made: dict[str, dict[str, Callable[[], Any]]] = {"graphs": {}, "calls": {}}
    # what is compiled comes before anything is enabled, ours last: unpatched classes for every peer
    todo = [("calls", name, CALLS[name]) for name in CALLS] + [("graphs", name, GRAPHS[name]) for name in GRAPHS]
    todo.sort(key=lambda item: (item[1].startswith(OURS), item[0] == "graphs"))
    for kind, name, label in todo:
        ours = name.startswith(OURS)
        if not ours and name not in request.peers:
            continue
        reason = None if ours else _left_out(name, request.dtype)
        if reason is not None:
            cell["unavailable"][f"{kind} {name}"] = reason
            continue
        notify({"stage": "prepare", "peer": label})
        start = time.perf_counter()
        try:
            run = variants.graph(name) if kind == "graphs" else _synchronised(variants.call(name))
            output = run().clone()
            torch.cuda.synchronize()
        except Exception as error:  # a peer's failure is a row of the table
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            cell["unavailable"][f"{kind} {name}"] = reason
            if ours:
                cell["red"] = f"{label}: {reason}"
            continue
        facts = judge(output, plain, truth, 1.0 if ours else PEER_SLACK)
        facts = {"label": label, **facts, "prepare_s": time.perf_counter() - start}
        cell[kind][name] = facts
        if facts["ok"]:
            made[kind][name] = run
        elif ours:
            cell["red"] = f"{label}: wrong answer, {facts['of_allowed']:.2f} of the allowed error"
        else:
            cell["unavailable"][f"{kind} {name}"] = f"wrong answer: {facts['of_allowed']:.2f} of the allowed error"
            del cell[kind][name]
    return made["graphs"], made["calls"]


def _left_out(name: str, dtype: str) -> str | None:
    peer = registry.by_name(name)
    return peer.available() or peer.refuses(dtype)


def _synchronised(run: Callable[[], Any]) -> Callable[[], Any]:
    from torch.cuda import synchronize

    def call() -> Any:
        output = run()
        synchronize()
        return output

    return call


def _served(variants: _Variants) -> dict[str, Any]:
    """How many parts of the enabled model ran fused, and why the others did not."""
    import mnv4_ops

    model = copy.deepcopy(variants.nhwc)
    _enable(lambda: mnv4_ops.enable(model))
    answer = mnv4_ops.explain(model, variants.x_nhwc)
    return {"fused": len(answer.served), "original": [f"{row.name}: {row.by}" for row in answer.fallbacks]}


def _store(rows: dict[str, Any], stats: Mapping[str, timing.Stats]) -> None:
    for name, values in stats.items():
        rows[name].update(values.as_dict())


def _derive(cell: dict[str, Any]) -> dict[str, Any]:
    """Ratios of the best peer to ours, and of the peak memory."""
    for kind, ours in (("graphs", OURS), ("calls", OURS), ("calls", OURS_GRAPHS)):
        rows = cell[kind]
        others = {name: facts["median_ms"] for name, facts in rows.items() if not name.startswith(OURS)}
        if ours in rows and others:
            best = min(others, key=others.__getitem__)
            rows[ours]["best_peer"] = best
            rows[ours]["speedup_vs_best_peer"] = others[best] / rows[ours]["median_ms"]
            rows[ours]["speedups"] = {name: value / rows[ours]["median_ms"] for name, value in others.items()}
    memory = cell["memory"]
    if OURS in memory and memory.get("eager_cl"):
        cell["memory_ratio"] = memory[OURS] / memory["eager_cl"]
    return cell
