"""What torch's tools count and show: FLOPs as of the original, ranges in the profiler with the names of our ops."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mnv4_ops
from mnv4_ops import _native
from mnv4_ops.adapters.record import Recorder
from mnv4_ops.adapters.timm import BLOCKS

timm = pytest.importorskip("timm")
L = pytest.importorskip("timm.layers")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
SMALL, HYBRID = "mobilenetv4_conv_small_035", "mobilenetv4_hybrid_medium_075"


def flops(call: Any, *args: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def model(name: str) -> Any:
    m = timm.create_model(name, num_classes=5).eval()
    for attention in m.modules():
        if isinstance(attention, L.MultiQueryAttention2d):
            # torch has no formula for its fused attention on a CPU
            attention.fused_attn = False
    return m


@pytest.mark.parametrize("name", [SMALL, HYBRID])
def test_flops_of_ops_and_models(name: str) -> None:
    m, x = model(name), torch.randn(2, 3, 65, 96)
    want = flops(m, x)
    mnv4_ops.enable()
    with torch.no_grad():
        m(x)
    assert flops(m, x) == want
    # each block as an op
    x = torch.randn(2, m.conv_stem.out_channels, 33, 48)
    for stage in m.blocks:
        for block in stage:
            part = BLOCKS[type(block)](Recorder(block), 0)
            op = getattr(torch.ops.mnv4, part.op)
            params = list(part.params)
            assert flops(op, x, params, list(part.eps), *part.args) == flops(block, x), part.spec
            with torch.no_grad():
                x = block(x)


def test_flops_of_compiled_models() -> None:
    from mnv4_ops import traced
    from mnv4_ops.ops.program import recipe_of

    m, x = model(SMALL), torch.randn(2, 3, 64, 64)
    want = flops(m, x)
    mnv4_ops.enable()
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(m, backend="eager")(x)
        (key,) = (key for key, served in traced._served.items() if served.ref() is m)
    assert flops(lambda x: torch.ops.mnv4.module(x, key), x) == want
    rec = Recorder(m)
    parts = mnv4_ops.adapters.timm.forward(rec).steps
    recipe = recipe_of([(part.op, part.params, part.args) for part in parts])
    params = [t for part in parts for t in part.params if t is not None]
    eps = [e for part in parts for e in part.eps]
    assert flops(torch.ops.mnv4.program, x, params, eps, recipe) == want
    torch.compiler.reset()


def test_flops_of_the_small_ops() -> None:
    x, w, d = torch.randn(2, 8, 9, 7), torch.randn(12, 8, 1, 1), torch.randn(8, 1, 3, 3)
    none = [None] * 5
    ops = torch.ops.mnv4
    spread = 2 * 2 * 5 * 4 * 8 * 9  # stride 2
    assert flops(ops.pointwise, x, [w, *none], [0.0], "relu", False) == 2 * 2 * 63 * 8 * 12
    assert flops(ops.depthwise, x, [d, *none], [0.0], 2, "symmetric", "none") == spread
    both = [d, *none, w, *none]
    got = flops(ops.depthwise_pointwise, x, both, [0.0, 0.0], 2, "same", "none", "none", False)
    assert got == spread + 2 * 2 * 5 * 4 * 8 * 12
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 12)
    assert flops(ops.mqa_attention, q, k, v) == 2 * 2 * 4 * 10 * 6 * (8 + 12)
    assert flops(ops.head, x, [*[None] * 12, torch.randn(3, 8), *none], [0.0] * 3, "relu") == 2 * 2 * 8 * 3


def test_the_counter_is_not_imported_for_its_formulas(tmp_path: Path) -> None:
    code = (
        "import sys, torch, mnv4_ops; mnv4_ops.enable()\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.mnv4.uib in flop_registry and torch.ops.mnv4.module in flop_registry\n"
        "assert not mnv4_ops.imports._waiting.get('torch.utils.flop_counter')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def ranges(call: Any, x: Tensor) -> dict[str, int]:
    with torch.no_grad():
        call(x)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            call(x)
    return {event.key: event.count for event in found.key_averages() if event.key.startswith("mnv4::")}


@pytest.mark.no_poison
def test_profiler_ranges() -> None:
    m, x = model(SMALL), torch.randn(1, 3, 64, 64)
    assert ranges(m, x) == {}
    mnv4_ops.enable()
    assert ranges(m, x) == {"mnv4::program": 1}
    assert ranges(m.forward_intermediates, x) == {"mnv4::conv_bn_act": 5, "mnv4::uib": 12}
    pyramid = timm.create_model(SMALL, features_only=True, out_indices=(0, 3)).eval()
    assert ranges(pyramid, x)["mnv4::program"] >= 1
    # hooks inside: block by block
    hooked = copy.deepcopy(m)
    hooked.blocks[2][1].register_forward_hook(lambda *args: None)
    assert ranges(hooked, x)["mnv4::uib"] >= 11
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        m(x)
    (event,) = (event for event in found.events() if event.name == "mnv4::program")
    assert event.cpu_time > 0
