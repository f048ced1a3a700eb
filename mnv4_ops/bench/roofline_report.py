"""Rooflines as a document (JSON) and as files of figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnv4_ops.bench import ceilings, inputs, plots, roofline, roofline_plot
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.spec import MODELS, VARIANTS, standard_resolution

SCHEMA = "mnv4-ops/roofline/1"
Ridge = tuple[str, float]


def models_of(names: Sequence[str]) -> list[str]:
    """Names of the ledger, with groups and timm's prefix resolved."""
    known = (*MODELS, *VARIANTS)
    found: list[str] = []
    for name in names:
        for part in inputs.GROUPS.get(name, (inputs.ledger_name(name),)):
            if part not in known:
                raise BenchError(f"--model: expected one of {', '.join((*known, *inputs.GROUPS))}, got {name!r}")
            if part not in found:
                found.append(part)
    if not found:
        raise BenchError("--model: expected at least one model")
    return found


def ridges_of(texts: Sequence[str]) -> list[Ridge]:
    """Labels and values; `machine` is measured."""
    machine = ceilings.measure(1, precisions=()).ridge() if "machine" in texts else None
    found = [roofline.ridge_point(text, machine) for text in texts]
    if not found:
        raise BenchError("--ridge: expected at least one ridge point")
    return found


def document(
    models: Sequence[str], ridges: Sequence[Ridge], resolution: int | None, *, sweep: bool, scale: roofline.Scale
) -> dict[str, Any]:
    """All numbers: costs in MAC-equivalents, sizes in bytes."""
    result: dict[str, Any] = {"schema": SCHEMA, **scale._asdict(), "models": [], "sweep": []}
    for model in models:
        rows = roofline.blocks(model, resolution)
        points = []
        for label, value in ridges:
            points.append(
                {
                    "label": label,
                    "ridge": value,
                    "cost": roofline.cost(rows, value, scale=scale),
                    "fused_cost": roofline.cost(rows, value, fused=True, scale=scale),
                    "memory_share": roofline.memory_share(rows, value, scale=scale),
                    "blocks": [
                        {
                            "cost": row.cost(value, fused=False, scale=scale),
                            "fused_cost": row.cost(value, fused=True, scale=scale),
                            "bound": row.bound(value, fused=False, scale=scale),
                            "fused_bound": row.bound(value, fused=True, scale=scale),
                        }
                        for row in rows
                    ],
                }
            )
        result["models"].append(
            {
                "model": model,
                "resolution": resolution or standard_resolution(model),
                "blocks": [
                    {
                        "name": row.name,
                        "kind": row.kind,
                        "macs": scale.batch * row.macs,
                        "bytes": row.bytes(fused=False, scale=scale),
                        "fused_bytes": row.bytes(fused=True, scale=scale),
                    }
                    for row in rows
                ],
                "ridges": points,
            }
        )
    if sweep:
        generations = roofline.generations()
        relative = [roofline.relative_to_best(generations, value) for _, value in ridges]
        result["sweep"] = [
            {
                "model": model.name,
                "family": model.family,
                "top1": model.top1,
                "resolution": model.resolution,
                "costs": [model.cost(value) for _, value in ridges],
                "relative": [found[model.name] for found in relative],
            }
            for model in generations
        ]
    return result


def write_figures(
    folder: Path,
    models: Sequence[str],
    ridges: Sequence[Ridge],
    resolution: int | None,
    *,
    sweep: bool,
    scale: roofline.Scale,
) -> list[Path]:
    """PNG and SVG of every model (blocks, curve) and of the sweep; the files written."""
    files: list[Path] = []
    for model in models:
        rows = roofline.blocks(model, resolution)
        title = f"{model} {resolution or standard_resolution(model)}, batch {scale.batch}"
        title += f", {scale.itemsize} byte(s) an element"
        files += plots.save(
            roofline_plot.block_bars(title, rows, ridges, scale=scale), folder, f"roofline_{model}_blocks"
        )
        files += plots.save(roofline_plot.model_curve(title, rows, scale=scale), folder, f"roofline_{model}")
    if sweep:
        files += plots.save(roofline_plot.sweep(roofline.generations()), folder, "roofline_generations")
    return files
