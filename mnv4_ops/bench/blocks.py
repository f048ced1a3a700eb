"""One row per block of a model: our native block alone (no Python wrapper) against peers, GFLOP/s and fraction of the
FMA peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mnv4_ops.bench import inputs, machine, report, timing
from mnv4_ops.bench import rows as op_rows
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.isolate import Notify
from mnv4_ops.bench.ops import Case, Op
from mnv4_ops.bench.ops.blocks import shape
from mnv4_ops.bench.peers.base import Run
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec, head_spec, ledger

SCHEMA = "mnv4-ops/blocks/1"
OURS = op_rows.OURS
DEFAULT_PEERS = ("torch_eager_cl", "onnxruntime", "openvino", "xnnpack")


@dataclass(frozen=True)
class BlocksRequest:
    """`model` as timm names it; `peers` are names."""

    model: str
    batch: int
    threads: int
    resolution: int | None = None
    peers: tuple[str, ...] = DEFAULT_PEERS
    repeats: int = 8
    seconds: float = 4.0  # per block


class _Row(Op):
    """A row of the ledger as it is; no op of its own."""

    def shape(self, spec: Any) -> str:
        return shape(spec)


ROW = _Row()


def units(model: str, resolution: int | None = None) -> list[Case]:
    """Distinct native blocks of a model in order of execution, `places` the rows that have each; everything from the
    last 1x1 on is one unit, `head`.
    """
    name = inputs.ledger_name(model)
    rows: dict[tuple[Spec, int, int], list[str]] = {}
    for entry in ledger(name, resolution):
        spec, row = entry.spec, entry.name
        if row in ("pool", "conv_head", "classifier"):
            continue
        if row == "4.0":
            spec, row = head_spec(name), "head"
        if isinstance(spec, (ConvSpec, FusedIBSpec, MQASpec, UIBSpec, HeadSpec)):
            rows.setdefault((spec, entry.height, entry.width), []).append(row)
    return [Case("block", spec, h, w, shape(spec), tuple(names)) for (spec, h, w), names in rows.items()]


def variants(unit: Case, request: BlocksRequest) -> tuple[dict[str, Run], dict[str, str]]:
    """Runnable variants of a unit that passed the gate, and the reason of each that is left out."""
    runs, left_out, _ = op_rows.prepare(ROW, unit, op_rows.Setting(request.batch, request.threads), request.peers)
    return runs, left_out


def measure_blocks(request: BlocksRequest, notify: Notify) -> dict[str, Any]:
    """All units of a model. Meant for a fresh process (`isolate.run`)."""
    torch.set_num_threads(request.threads)
    todo = units(request.model, request.resolution)
    if not todo:
        raise BenchError(f"--blocks: the ledger has no blocks of {request.model}")
    rows: list[dict[str, Any]] = []
    peaks = [machine.fma_peak(request.threads)]
    with torch.inference_mode():
        for index, unit in enumerate(todo):
            notify({"stage": "block", "name": unit.places[0], "done": index, "total": len(todo)})
            runs, left_out = variants(unit, request)
            stats = timing.interleave(runs, repeats=request.repeats, seconds=request.seconds)
            rows.append(
                {
                    "names": list(unit.places),
                    "kind": unit.spec.kind,
                    "input": [request.batch, unit.spec.channels[0], unit.height, unit.width],
                    "macs": unit.spec.macs(unit.height, unit.width) * request.batch,
                    "shape": unit.shape,
                    "variants": {name: values.as_dict() for name, values in stats.items()},
                    "unavailable": left_out,
                }
            )
            peaks.append(machine.fma_peak(request.threads))
    peak = max((value for value in peaks if value), default=None)
    for row in rows:
        for facts in row["variants"].values():
            facts["gflops"] = 2 * row["macs"] / facts["median_ms"] / 1e6
            if peak:
                facts["fraction_of_peak"] = facts["gflops"] / peak
    return {
        "model": request.model,
        "batch": request.batch,
        "threads": request.threads,
        "peak_gflops": peak,
        "blocks": rows,
    }


def rows_of(result: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows of the table, with a total row in which each block counts as often as the model has it."""
    present = [name for row in result["blocks"] for name in row["variants"]]
    others = [name for name in dict.fromkeys(present) if name != OURS]
    columns = ("block", "kind", "input", "shape", "MMAC", "mnv4_ops ms", "GFLOP/s", "of peak", *others, "vs best")
    rows = []
    totals: dict[str, float | None] = dict.fromkeys((OURS, *others), 0.0)
    macs = 0
    for row in result["blocks"]:
        count = len(row["names"])
        macs += count * row["macs"]
        times = {name: row["variants"].get(name, {}).get("median_ms") for name in (OURS, *others)}
        for name, value in times.items():
            before = totals[name]
            totals[name] = None if before is None or value is None else before + count * value
        names = row["names"][0] + (f" x{count}" if count > 1 else "")
        shape = f"{row['input'][2]}x{row['input'][3]}"
        facts = row["variants"].get(OURS, {})
        peak = facts.get("fraction_of_peak")
        rows.append([names, row["kind"], shape, row["shape"], *_figures(row["macs"], times, peak, others)])
    total = totals[OURS]
    fraction = 2 * macs / total / 1e6 / result["peak_gflops"] if total and result["peak_gflops"] else None
    rows.append(["all", "", "", "", *_figures(macs, totals, fraction, others)])
    return columns, rows


def _figures(macs: int, times: dict[str, Any], peak: float | None, others: list[str]) -> list[str]:
    mine = times[OURS]
    known = [times[name] for name in others if times[name]]
    return [
        f"{macs / 1e6:.1f}",
        f"{mine:.4f}" if mine else "",
        f"{2 * macs / mine / 1e6:.1f}" if mine else "",
        f"{100 * peak:.0f} %" if peak else "",
        *(f"{times[name]:.4f}" if times[name] else "" for name in others),
        f"{min(known) / mine:.2f}x" if mine and known else "",
    ]


def heading(result: dict[str, Any]) -> str:
    peak = result["peak_gflops"]
    name = inputs.ledger_name(result["model"])
    text = f"{name}, batch {result['batch']}, {report.threads_text(result['threads'])}, fp32, ms per block"
    return text + (f", FMA peak {peak:.0f} GFLOP/s" if peak else "")


def table(result: dict[str, Any]) -> Table:
    columns, rows = rows_of(result)
    view = Table(title=heading(result), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        view.add_column(column, justify="left" if index < 4 else "right", no_wrap=True)
    for row in rows:
        view.add_row(*row)
    return view


def markdown(result: dict[str, Any]) -> str:
    columns, rows = rows_of(result)
    return f"### {heading(result)}\n\n{report.markdown_table(columns, rows)}"
