"""What is served on request only, because no GPU has run it yet."""

from __future__ import annotations

import os

VARIABLE = "MNV4_OPS_GPU_EXPERIMENTAL"


def experimental() -> bool:
    """Whether `MNV4_OPS_GPU_EXPERIMENTAL=1`: the Triton kernels of Mobile MQA, tested in Triton's interpreter alone."""
    return os.environ.get(VARIABLE, "") == "1"
