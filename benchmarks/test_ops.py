"""Every op of the ledger against every peer: pointwise, depthwise, both, each block, attention, head."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from mnv4_ops.bench import ceilings, rows
from mnv4_ops.bench import ops as registry
from mnv4_ops.bench.ops import Case


@lru_cache
def limits(threads: int) -> ceilings.Ceilings:
    return ceilings.measure(threads, precisions=())


@pytest.mark.usefixtures("pinned")
def test_op(case: Case, setting: rows.Setting, peers: tuple[str, ...], smoke: bool, clock: Any, benchmark: Any) -> None:
    op = registry.by_name(case.op)
    with torch.inference_mode():
        runs, left_out, errors = rows.prepare(op, case, setting, peers)
    wrong = {name: reason for name, reason in left_out.items() if reason.startswith("wrong answer")}
    # red prints no speed, ours or that of a peer
    assert rows.OURS not in wrong, wrong
    if rows.OURS not in runs:
        pytest.skip(left_out[rows.OURS])
    stats = clock(runs, rows.OURS)
    row = rows.describe(op, case, setting)
    row["variants"] = {name: values | {"of_allowed": errors[name]} for name, values in stats.items()}
    row |= {"unavailable": left_out, "red": None}
    benchmark.extra_info.update(rows.derive(row, None if smoke or setting.device != "cpu" else limits(setting.threads)))
