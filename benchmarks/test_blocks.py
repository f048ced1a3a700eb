"""Every distinct block of the ledger: the native block, torch and the runtimes, one block at a time. The gate runs
first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mnv4_ops.bench import blocks
from mnv4_ops.spec import MODELS

VARIANTS = (blocks.OURS, *blocks.DEFAULT_PEERS)


def _units() -> list[Any]:
    seen = set()
    found = []
    for model in MODELS:
        for unit in blocks.units(model):
            key = (unit.spec, unit.height, unit.width)
            if key not in seen:
                seen.add(key)
                found.append(pytest.param(unit, id=f"{model}-{unit.names[0]}-{unit.spec.kind}"))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("unit", _units())
def test_block(
    unit: blocks.Unit,
    variant: str,
    threads: int,
    smoke: bool,
    request: pytest.FixtureRequest,
    clock: Callable[[Callable[[], Any]], None],
    benchmark: Any,
) -> None:
    if smoke:
        if "conv_small" not in request.node.name:
            pytest.skip("not part of the smoke run")
        unit = blocks.Unit(unit.names, unit.spec, 9, 7)
    peers = () if variant == blocks.OURS else (variant,)
    with torch.inference_mode():
        runs, left_out = blocks.variants(unit, blocks.BlocksRequest("", 1, threads, peers=peers))
    if variant not in runs:
        reason = left_out[variant]
        assert not reason.startswith("wrong answer"), reason
        pytest.skip(reason)
    benchmark.extra_info.update(threads=threads, macs=unit.spec.macs(unit.height, unit.width))
    clock(runs[variant])
