"""The correctness gate: an output that is not the reference's prints no speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# fp32 networks of 20 to 60 layers agree to about 1e-6 whatever the order of summation; a wrong tap or fold is above
# 1e-3
TOLERANCE = 2e-5
# how the reason begins of a variant that has no time because of its answer
WRONG = "wrong answer"


@dataclass(frozen=True)
class Agreement:
    """Of an output with the reference. `error` is max|d| / max|reference|; `top1` says whether every image gets the
    same class.
    """

    error: float
    top1: bool
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        # a NaN fails
        return self.top1 and self.error <= self.tolerance

    def __str__(self) -> str:
        same = "same top-1" if self.top1 else "another top-1"
        return f"max|d|/max|ref| {self.error:.1e} (limit {self.tolerance:.0e}), {same}"


def as_tensor(output: Any, like: torch.Tensor) -> torch.Tensor:
    """A peer's output (torch or numpy, NHWC if its channels come last) as a tensor shaped like the reference."""
    if isinstance(output, (list, tuple)):
        (output,) = output
    tensor = output.detach() if isinstance(output, torch.Tensor) else torch.from_numpy(np.array(output))
    if tensor.shape != like.shape:
        raise ValueError(f"expected an output of shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    return tensor.to(torch.float32)


def compare(output: Any, reference: torch.Tensor, tolerance: float = TOLERANCE) -> Agreement:
    """`output` against `reference` [N, classes] or [N, C, H, W] (there top-1 is not asked)."""
    tensor = as_tensor(output, reference).double()
    expected = reference.double()
    error = ((tensor - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    top1 = expected.dim() != 2 or torch.equal(tensor.argmax(1), expected.argmax(1))
    return Agreement(error, top1, tolerance)
