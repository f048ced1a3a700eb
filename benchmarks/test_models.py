"""Whole models on the photograph, one variant per row. The correctness gate runs first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from mnv4_ops.bench import cell, gate, inputs
from mnv4_ops.bench.peers import ALL, Peer, Unsupported

MODELS = ("conv_small", "conv_medium", "conv_large", "hybrid_medium", "hybrid_large")
# a compiler run per model is no smoke test
SLOW_TO_PREPARE = ("torch_compile", "torch_compile_cl", "torch_freeze_cl")


@lru_cache(maxsize=1)
def model_and_photo(
    name: str, batch: int, resolution: int | None
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    (full,) = inputs.resolve_models([name])
    model = inputs.load_model(full, pretrained=False)
    side = inputs.resolution_of(full, resolution)
    photo = inputs.photo_batch(inputs.photograph(None), model, batch=batch, resolution=side)
    with torch.inference_mode():
        return model, photo, model(photo)


@pytest.mark.parametrize("peer", ALL, ids=lambda peer: peer.name)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_model(
    name: str,
    batch: int,
    peer: Peer,
    threads: int,
    smoke: bool,
    clock: Callable[[Callable[[], Any]], None],
    benchmark: Any,
) -> None:
    if smoke and (name != "conv_small" or batch != 1 or peer.name in SLOW_TO_PREPARE):
        pytest.skip("not part of the smoke run")
    reason = peer.available()
    if reason:
        pytest.skip(reason)
    resolution = 64 if smoke else None
    model, photo, reference = model_and_photo(name, batch, resolution)
    with torch.inference_mode():
        try:
            run = peer.prepare(model, photo, threads)
        except Unsupported as error:
            pytest.skip(str(error))
        agreement = gate.compare(run(), reference)
    assert agreement.ok, agreement
    macs = cell.macs_of(name, photo.shape[-1])
    benchmark.extra_info.update(threads=threads, macs=None if macs is None else macs * batch, error=agreement.error)
    clock(run)
