"""One cell of the result table: one model, batch size and number of threads, all variants in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mnv4_ops.bench import gate, inputs, machine, timing
from mnv4_ops.bench.isolate import Notify

BASELINE = "torch_eager"
OURS = "mnv4_ops"
# a headline row counts only against all of these
HEADLINE_PEERS = ("onnxruntime", "openvino", "xnnpack")


@dataclass(frozen=True)
class CellRequest:
    """`peers` are names; `weights_note` is empty for pretrained weights and says otherwise why they are random."""

    model: str
    batch: int
    threads: int
    resolution: int | None = None
    image: str | None = None
    peers: tuple[str, ...] = ()
    weights_note: str = ""
    repeats: int = 15
    seconds: float = 60.0


def macs_of(model: str, resolution: int) -> int | None:
    """Multiply-accumulates for one image, from the ledger; None for a model outside of it."""
    from mnv4_ops.spec import ledger

    try:
        return sum(entry.macs for entry in ledger(inputs.ledger_name(model), resolution))
    except ValueError:
        return None


def strict_where_kernels_are_expected(model: str) -> None:
    """Makes an original forward an error for the models of the ledger."""
    # an original forward inside the measured run would be a silent lie
    if macs_of(model, 224) is not None:
        os.environ["MNV4_OPS_STRICT"] = "1"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure_cell(request: CellRequest, notify: Notify) -> dict[str, Any]:
    """Runs the gate, then the clock. Meant for a fresh process (`isolate.run`); a JSON-ready dict as in report.py."""
    import torch

    from mnv4_ops.bench import peers as registry

    torch.set_num_threads(request.threads)
    strict_where_kernels_are_expected(request.model)
    notify({"stage": "load"})
    model = inputs.load_model(request.model, pretrained=not request.weights_note)
    side = inputs.resolution_of(request.model, request.resolution)
    photo = inputs.photograph(request.image)
    example = inputs.photo_batch(photo, model, batch=request.batch, resolution=side)
    macs = macs_of(request.model, side)
    chosen = [peer for peer in registry.PEERS if peer.name in request.peers]
    eager = registry.PEERS[0]
    assert eager.name == BASELINE
    with torch.inference_mode():
        reference = model(example).clone()
        cell: dict[str, Any] = {
            **{key: value for key, value in asdict(request).items() if key in ("model", "batch", "threads")},
            "resolution": side,
            "weights": "random, seeded" if request.weights_note else "pretrained",
            "macs": None if macs is None else macs * request.batch,
            "top1": _top1(reference, pretrained=not request.weights_note),
            "variants": {},
            "unavailable": {},
            "red": None,
        }
        runs: dict[str, Callable[[], Any]] = {}
        # ours first: enabling resets torch's compiler where something was compiled before
        for peer in (registry.OURS, eager, *(p for p in chosen if p.name != eager.name)):
            notify({"stage": "prepare", "peer": peer.label})
            reason, run, facts = prepare(peer, model, example, request.threads, reference)
            if run is not None:
                runs[peer.name] = run
                cell["variants"][peer.name] = {"label": peer.label, **facts}
            else:
                cell["unavailable"][peer.name] = reason
            if peer is registry.OURS and facts and run is None:
                cell["red"] = f"mnv4_ops: {reason}"
                return cell
        if OURS in runs:
            cell["served"] = _served(runs[OURS], example)
        peaks = [machine.fma_peak(request.threads)]
        switches = machine.involuntary_switches()
        stats = timing.interleave(
            runs,
            repeats=request.repeats,
            seconds=request.seconds,
            on_round=lambda done, total: notify({"stage": "round", "done": done, "total": total}),
        )
        calls = sum(values.calls for values in stats.values())
        cell["preempted_per_call"] = (machine.involuntary_switches() - switches) / calls
        peaks.append(machine.fma_peak(request.threads))
        for name, run in runs.items():
            # once more at the end: a race between threads would show here
            late = gate.compare(run(), reference)
            cell["variants"][name].update(stats[name].as_dict())
            if not late.ok and name == OURS:
                cell["red"] = f"the enabled model does not agree with the original after the timed runs: {late}"
    cell["peak_gflops"] = max((peak for peak in peaks if peak), default=None)
    return _derive(cell)


def prepare(
    peer: Any, model: Any, example: Any, threads: int, reference: Any
) -> tuple[str | None, Callable[[], Any] | None, dict[str, Any]]:
    """(reason, run, facts): reason and run are exclusive; facts are there once an output was seen."""
    reason = peer.available()
    if reason is not None:
        return reason, None, {}
    start = time.perf_counter()
    try:
        run = peer.prepare(model, example, threads)
        output = run()
    except Exception as error:  # a peer's failure is a row of the table
        return _reason(error), None, {"failed": True} if peer.name == OURS else {}
    seconds = time.perf_counter() - start
    agreement = gate.compare(output, reference)
    facts = {"error": agreement.error, "top1_equal": agreement.top1, "prepare_s": seconds}
    return (None, run, facts) if agreement.ok else (f"{gate.WRONG}: {agreement}", None, facts)


def _served(run: Any, example: Any) -> dict[str, Any]:
    """How many parts of the enabled model ran fused, and why the others did not."""
    import mnv4_ops

    answer = mnv4_ops.explain(run.func, example)
    return {"fused": len(answer.served), "original": [f"{row.name}: {row.by}" for row in answer.fallbacks]}


def _top1(reference: Any, *, pretrained: bool) -> dict[str, Any]:
    index = int(reference[0].argmax())
    return {"index": index, "label": inputs.label_of("", index) if pretrained and reference.shape[1] == 1000 else None}


def _derive(cell: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s, fraction of peak and the speed-ups of a cell that was timed."""
    variants = cell["variants"]
    for facts in variants.values():
        if cell["macs"]:
            facts["gflops"] = 2 * cell["macs"] / facts["median_ms"] / 1e6
            if cell["peak_gflops"]:
                facts["fraction_of_peak"] = facts["gflops"] / cell["peak_gflops"]
    others = {name: facts["median_ms"] for name, facts in variants.items() if name != OURS}
    best = min(others, key=others.__getitem__)
    cell["best_peer"] = best
    cell["headline"] = OURS in variants and all(name in variants for name in HEADLINE_PEERS)
    if OURS in variants:
        ours = variants[OURS]["median_ms"]
        cell["speedup_vs_eager"] = others[BASELINE] / ours
        cell["speedup_vs_best_peer"] = others[best] / ours
    return cell
