"""The 2x rule: at most twice the error of plain torch in the same dtype, against float64 on the same parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_2x(got: Tensor, plain: Tensor, double: Tensor, what: str = "") -> None:
    assert got.shape == plain.shape, what
    assert got.dtype == plain.dtype, what
    error, allowed = (got.double() - double).abs(), (plain.double() - double).abs()
    scale = float(double.abs().max())
    ulp = torch.finfo(got.dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale else 0.0
    limit = 2 * float(allowed.max()) + 2 * ulp
    assert float(error.max()) <= limit, f"{what} max {float(error.max()):.2e} of {limit:.2e}"
    if double.numel() >= 1024:
        rms, rms_limit = (float(e.square().mean().sqrt()) for e in (error, allowed))
        assert rms <= max(2 * rms_limit, ulp * 1e-3), f"{what} rms {rms:.2e} of {2 * rms_limit:.2e}"
