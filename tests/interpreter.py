"""Sums in Triton's interpreter by halves, as a GPU adds them.

The interpreter adds one number after another, which costs a long sum a multiple of the error that the kernel has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import ReduceOps


def _by_halves(self: Any, given: Any) -> Any:
    values = given.handle.data
    if self.axis is None or values.shape[self.axis] & (values.shape[self.axis] - 1):
        raise AssertionError(f"sum over axis {self.axis} of {values.shape}: no kernel had one like it")
    values = np.moveaxis(values, self.axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    total = np.moveaxis(values, 0, self.axis)
    return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), given.dtype)


def add_by_halves() -> None:
    """From now on, in this process."""
    ReduceOps.sum = _by_halves
