"""A whole model through the real kernels, in Triton's interpreter, on tensors of the CPU: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mnv4_ops import _native

pytest.importorskip("timm")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

CODE = """
import copy, pytest, torch
import interpreter, mnv4_ops, standin
from mnv4_ops import check_gpu
import mnv4_ops.triton_kernels as kernels
from mnv4_ops.ops import cuda
from rule import assert_2x
from small_models import model_of_few_blocks

interpreter.add_by_halves()
model = model_of_few_blocks("mobilenetv4_conv_small_035", num_classes=131)
with standin.serving_cpu(pytest.MonkeyPatch()) as patch, torch.inference_mode(), check_gpu.ieee():
    patch.setattr(cuda, "kernels", lambda: kernels)
    for dtype, size in [(torch.float16, (2, 3, 32, 35)), (torch.float32, (1, 3, 33, 32))]:
        model = model.to(dtype)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable(cuda_graphs=True):
            got = model(x)
            assert mnv4_ops.explain(model, x).served
        assert_2x(got, plain, double)
print("fine")
"""

ATTENTION = """
import copy, pytest, torch
import interpreter, mnv4_ops, standin
from mnv4_ops import check_gpu
import mnv4_ops.triton_kernels as kernels
from mnv4_ops.ops import cuda
from mnv4_ops.reference import randomize_
from rule import assert_2x
from timm.models._efficientnet_blocks import MobileAttention

interpreter.add_by_halves()
more = dict(num_heads=2, key_dim=16, value_dim=24, use_multi_query=True)
model = torch.nn.Sequential(MobileAttention(24, 24, kv_stride=2, **more), MobileAttention(24, 24, **more))
model = randomize_(model).eval()
with standin.serving_cpu(pytest.MonkeyPatch()) as patch, torch.inference_mode(), check_gpu.ieee():
    patch.setattr(cuda, "kernels", lambda: kernels)
    for dtype, size in [(torch.float16, (2, 24, 7, 6)), (torch.float32, (1, 24, 5, 8))]:
        model = model.to(dtype)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable():
            got = model(x)
            assert len(mnv4_ops.explain(model, x).served) == 2
        assert_2x(got, plain, double)
        q, k, v = (torch.randn(2, heads, 9, 16).to(dtype) for heads in (3, 1, 1))
        got = torch.ops.mnv4.mqa_attention(q, k, v)
        both = (q, k, v), [t.double() for t in (q, k, v)]
        plain, double = (torch.softmax(a @ b.mT / 4, -1) @ c for a, b, c in both)
        assert_2x(got, plain, double)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [CODE, ATTENTION], ids=["model", "attention"])
def test_model(code: str) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "MNV4_OPS_STRICT": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    # not in the checkout, whose bare source tree would be imported
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tempfile.gettempdir(),
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout
