"""What is served on request only, because no GPU has tested all of it yet."""

from __future__ import annotations

import os

VARIABLE = "MNV4_OPS_GPU_EXPERIMENTAL"


def experimental() -> bool:
    """Whether `MNV4_OPS_GPU_EXPERIMENTAL=1`: the Triton kernels of Mobile MQA, tested on a GPU in float16 alone."""
    return os.environ.get(VARIABLE, "") == "1"
