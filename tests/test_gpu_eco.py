"""Autocast and torch.compile of enabled models on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mnv4_ops
from mnv4_ops import patch
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.gpu
SMALL = "mobilenetv4_conv_small_050"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    patch.disable()


def model(dtype: torch.dtype = torch.float32) -> Any:
    return randomize_(timm.create_model(SMALL, num_classes=6)).eval().to("cuda", dtype)


def image(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_dtype_and_values_of_the_original(dtype: torch.dtype) -> None:
    m, x = model(), image()
    with torch.no_grad(), torch.autocast("cuda", dtype):
        want = m(x)
        with mnv4_ops.enable():
            got = m(x)
    assert got.dtype == want.dtype
    # cuDNN may choose another algorithm from call to call
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("inside", [False, True], ids=["by itself", "inside"])
def test_compiled_with_a_dynamic_batch(inside: bool) -> None:
    m = model(torch.float16)
    mnv4_ops.enable()
    compiled: Any = torch.compile((lambda x: m(x) * 1.0) if inside else m, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (2, 3, 8):
            x = image(n).half()
            torch.testing.assert_close(compiled(x), m(x), rtol=2e-2, atol=2e-2)
