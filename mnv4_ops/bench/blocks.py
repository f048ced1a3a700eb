"""One row per block of a model: our native block alone (no Python wrapper) against peers, GFLOP/s and fraction of the
FMA peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mnv4_ops import _native, check
from mnv4_ops.bench import gate, inputs, machine, report, timing
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.isolate import Notify
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec, head_spec, ledger

SCHEMA = "mnv4-ops/blocks/1"
OURS = "mnv4_ops"
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


@dataclass(frozen=True)
class Unit:
    """A distinct spec at one input size, and the ledger rows that have it."""

    names: tuple[str, ...]
    spec: Spec
    height: int
    width: int


def units(model: str, resolution: int | None = None) -> list[Unit]:
    """Distinct native blocks of a model in order of execution; everything from the last 1x1 on is one unit, `head`."""
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
    return [Unit(tuple(names), spec, h, w) for (spec, h, w), names in rows.items()]


def ours(module: Any, spec: Spec, x: torch.Tensor, threads: int) -> Callable[[], torch.Tensor]:
    """Runs the native block of `module` (see check.random_module) on x; the output buffer is reused."""
    params = module.params()
    native = check.native_block(spec, params)
    n, _, h, w = x.shape
    if isinstance(spec, HeadSpec):
        out = torch.empty(n, spec.features)
    else:
        ho, wo = spec.out_hw(h, w)
        out = torch.empty(n, ho, wo, spec.channels[1]).permute(0, 3, 1, 2)
    arguments = (x.data_ptr(), n, h, w, tuple(x.stride()), out.data_ptr(), threads)

    def run(_keep: Any = (x, params)) -> torch.Tensor:
        native.run(*arguments)
        return out

    return run


def variants(unit: Unit, request: BlocksRequest) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Runnable variants of a unit that passed the gate, and the reason of each that is left out."""
    from mnv4_ops.bench import peers as registry

    module = check.random_module(unit.spec)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(request.batch, unit.spec.channels[0], unit.height, unit.width, generator=generator)
    reference = module(x)
    runs: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    if _native.core is None:
        left_out[OURS] = f"no native library: {_native.reason}"
    else:
        runs[OURS] = ours(module, unit.spec, x.contiguous(memory_format=torch.channels_last), request.threads)
    for peer in registry.PEERS:
        if peer.name not in request.peers:
            continue
        reason = peer.available()
        if reason is None:
            try:
                runs[peer.name] = peer.prepare(module, x, request.threads)
            except Exception as error:  # a peer's failure is a row of the table
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if reason is not None:
            left_out[peer.name] = reason
    for name in list(runs):
        agreement = gate.compare(runs[name](), reference)
        # random inputs of one block decide no class
        if not agreement.error <= agreement.tolerance:
            del runs[name]
            left_out[name] = f"wrong answer: max|d|/max|ref| {agreement.error:.1e}"
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
            notify({"stage": "block", "name": unit.names[0], "done": index, "total": len(todo)})
            runs, left_out = variants(unit, request)
            stats = timing.interleave(runs, repeats=request.repeats, seconds=request.seconds)
            rows.append(
                {
                    "names": list(unit.names),
                    "kind": unit.spec.kind,
                    "input": [request.batch, unit.spec.channels[0], unit.height, unit.width],
                    "macs": unit.spec.macs(unit.height, unit.width) * request.batch,
                    "shape": _shape(unit.spec),
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


def _shape(spec: Spec) -> str:
    """Channels and kernels in short: `96-384-96 k3,5 s2`."""
    if isinstance(spec, UIBSpec):
        kernels = ",".join(str(k) for k in (spec.start_kernel, spec.mid_kernel) if k)
        text = f"{spec.c_in}-{spec.c_mid}-{spec.c_out}" + (f" k{kernels}" if kernels else "")
        return text + (" s2" if spec.stride == 2 else "")
    if isinstance(spec, FusedIBSpec):
        return f"{spec.c_in}-{spec.c_mid}-{spec.c_out} k{spec.kernel}" + (" s2" if spec.stride == 2 else "")
    if isinstance(spec, ConvSpec):
        return f"{spec.c_in}-{spec.c_out} k{spec.kernel}" + (" s2" if spec.stride == 2 else "")
    if isinstance(spec, MQASpec):
        dims = f"{spec.key_dim}" if spec.key_dim == spec.value_dim else f"{spec.key_dim},{spec.value_dim}"
        return f"{spec.c} h{spec.heads} d{dims}" + (" kv s2" if spec.kv_stride == 2 else "")
    if isinstance(spec, HeadSpec):
        return f"{spec.c_in}-{spec.c_feat}-{spec.c_hidden}-{spec.classes}"
    return spec.kind


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
