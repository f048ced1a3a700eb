"""Whole models on the photograph against every peer. The correctness gate runs first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from mnv4_ops.bench import cell, gate, inputs, rows
from mnv4_ops.bench import peers as registry


@pytest.mark.usefixtures("pinned")
def test_model(
    model_name: str, setting: rows.Setting, peers: tuple[str, ...], smoke: bool, clock: Any, benchmark: Any
) -> None:
    if setting.device != "cpu" or setting.dtype != "float32":
        pytest.skip("whole models on a GPU: mnv4-ops bench --device cuda")
    (full,) = inputs.resolve_models([model_name])
    model = inputs.load_model(full, pretrained=False)
    side = 64 if smoke else inputs.resolution_of(full, None)
    photo = inputs.photo_batch(inputs.photograph(None), model, batch=setting.batch, resolution=side)
    runs: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with torch.inference_mode():
        reference = model(photo)
        for peer in (registry.OURS, *(peer for peer in registry.PEERS if peer.name in peers)):
            reason, run, _ = cell.prepare(peer, model, photo, setting.threads, reference)
            if run is None:
                left_out[peer.name] = str(reason)
            else:
                runs[peer.name] = run
    assert not left_out.get(rows.OURS, "").startswith("wrong answer"), left_out[rows.OURS]
    if rows.OURS not in runs:
        pytest.skip(left_out[rows.OURS])
    macs = cell.macs_of(full, side)
    row = {"op": "model", "case": f"{model_name} {side}", "macs": macs * setting.batch if macs else 0, "bytes": 0}
    row |= {"batch": setting.batch, "threads": setting.threads, "dtype": setting.dtype, "device": setting.device}
    row |= {"variants": clock(runs, rows.OURS), "unavailable": left_out, "red": None}
    with torch.inference_mode():
        assert gate.compare(runs[rows.OURS](), reference).ok
    benchmark.extra_info.update(rows.derive(row))
