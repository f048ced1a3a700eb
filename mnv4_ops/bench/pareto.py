"""Accuracy against latency: published top-1 of timm's checkpoints, latencies measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mnv4_ops.bench import cell, inputs, isolate, machine, published, report, run
from mnv4_ops.bench import peers as registry
from mnv4_ops.bench.errors import BenchError

SCHEMA = "mnv4-ops/pareto/1"
OURS = cell.OURS
_METHOD = {
    "before": "the better of torch eager in NCHW and in channels_last, median of interleaved calls on the photograph",
    "after": "the same model after mnv4_ops.enable(), interleaved with the former; only MobileNetV4 changes",
    "weights": "random and seeded where the checkpoint could not be reached: latency does not depend on them",
    "accuracy": "published, not measured here; the source stands with each model",
}


@dataclass(frozen=True)
class PointRequest:
    """A timm model at the resolution that its published accuracy belongs to."""

    checkpoint: str
    resolution: int
    threads: int
    batch: int = 1
    repeats: int = 9
    seconds: float = 10.0


def measure_point(request: PointRequest, notify: isolate.Notify) -> dict[str, Any]:
    """Milliseconds per image of the variants. Meant for a fresh process (`isolate.run`)."""
    import torch

    from mnv4_ops.bench import timing

    torch.set_num_threads(request.threads)
    name = request.checkpoint.split(".")[0]
    ours = cell.macs_of(name, 224) is not None
    cell.strict_where_kernels_are_expected(name)
    notify({"stage": "load"})
    model = inputs.load_model(name, pretrained=False)
    photo = inputs.photograph(None)
    example = inputs.photo_batch(photo, model, batch=request.batch, resolution=request.resolution)
    runs, unavailable = {}, {}
    with torch.inference_mode():
        reference = model(example).clone()
        peers = [registry.by_name(name) for name in ("torch_eager", "torch_eager_cl")]
        for peer in (*([registry.OURS] if ours else []), *peers):
            notify({"stage": "prepare", "peer": peer.label})
            reason, variant, _ = cell.prepare(peer, model, example, request.threads, reference)
            if variant is None:
                unavailable[peer.name] = reason
            else:
                runs[peer.name] = variant
        stats = timing.interleave(runs, repeats=request.repeats, seconds=request.seconds)
    variants = {name: values.as_dict() for name, values in stats.items()}
    before = [facts["median_ms"] for name, facts in variants.items() if name != OURS]
    result: dict[str, Any] = {"variants": variants, "unavailable": unavailable}
    result["before_ms"] = min(before) / request.batch
    result["after_ms"] = variants[OURS]["median_ms"] / request.batch if OURS in variants else None
    return result


def front(points: Sequence[dict[str, Any]]) -> set[str]:
    """Models that no other beats in both accuracy and latency, each by its best latency."""

    def ms(point: dict[str, Any]) -> float:
        return float(point.get("after_ms") or point["before_ms"])

    return {
        p["model"]
        for p in points
        if not any(
            ms(o) <= ms(p) and o["top1"] >= p["top1"] and (ms(o), o["top1"]) != (ms(p), p["top1"]) for o in points
        )
    }


def measure(
    families: Sequence[str], threads: int, console: Console, *, repeats: int = 9, seconds: float = 10.0,
    resolution: int | None = None,
) -> run.Outcome:  # fmt: skip
    """All checkpoints of some families (all for none)."""
    chosen = published.checkpoints(*families)
    known = sorted({row.family for row in published.checkpoints()})
    if not chosen:
        raise BenchError(f"--family: expected some of {', '.join(known)}, got {', '.join(families)!r}")
    points, paper = [], published.paper()
    for row in chosen:
        side = resolution or row.resolution
        request = PointRequest(row.checkpoint, side, threads, repeats=repeats, seconds=seconds)
        try:
            found = run.run_cell(measure_point, request, row.short, console, threads)
        except RuntimeError as error:
            raise BenchError(f"{row.short}: the measuring process failed: {str(error).splitlines()[-1]}") from error
        quoted = paper.get(row.short, {}).get("top1")
        points.append({"model": row.short, "paper_top1": quoted, **asdict(row), "measured_resolution": side, **found})
    document = {
        "schema": SCHEMA,
        "environment": machine.environment(),
        "method": _METHOD,
        "threads": threads,
        "points": points,
    }
    console.print(table(document))
    ok = all(point["after_ms"] for point in points if point["family"] == "MobileNetV4")
    return run.Outcome(document, markdown(document), ok)


_COLUMNS = ("model", "family", "timm top-1", "paper top-1", "resolution", "before ms", "after ms", "speed-up", "front")


def rows_of(document: dict[str, Any]) -> list[list[str]]:
    best = front(document["points"])
    return [
        [
            point["model"],
            point["family"],
            f"{point['top1']:.2f} %",
            f"{point['paper_top1']:.1f} %" if point.get("paper_top1") else "",
            str(point["measured_resolution"]),
            f"{point['before_ms']:.2f}",
            f"{point['after_ms']:.2f}" if point["after_ms"] else "",
            f"{point['before_ms'] / point['after_ms']:.2f}x" if point["after_ms"] else "",
            "yes" if point["model"] in best else "",
        ]
        for point in sorted(document["points"], key=lambda point: -point["top1"])
    ]


def table(document: dict[str, Any]) -> Table:
    title = f"Accuracy against latency, batch 1, {report.threads_text(document['threads'])}, fp32"
    view = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(_COLUMNS):
        view.add_column(column, justify="left" if index < 2 else "right")
    for row in rows_of(document):
        view.add_row(*row)
    return view


def markdown(document: dict[str, Any]) -> str:
    env = document["environment"]
    cpu = (env.get("cpu") or {}).get("model", "unknown CPU")
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    head = (
        f"{cpu}, {env['date'][:10]}, commit {env['commit'] or 'none'}; {packages}. Median milliseconds per image.\n\n"
    )
    return head + report.markdown_table(_COLUMNS, rows_of(document))
