"""Triton kernels of mnv4_ops, one operation per file; installed as ``mnv4_ops.triton_kernels``.

`Block`, `Head` and `MobileMQA` mirror the classes of `_core` on a GPU; they are imported, and Triton with them, on
first use. `tuned/` holds the tables of tuned configurations, one per GPU; `index.json` says which GPUs share theirs.

File by operation: pointwise.py ([depthwise ->] 1x1), expand.py ([depthwise ->] 1x1 with the input on chip, FFN,
ConvNext), depthwise.py, dense.py (stem, conv, FusedIB), head.py (1x1 + pool), vector.py (1x1 of one
or two pixels), mqa.py (Mobile MQA), attention.py.
plan.py takes a block apart, config.py chooses tiles, build.py makes launches, launch.py starts them; block.py,
mqa_block.py (with mqa_config.py, mqa_tune.py) and attention_op.py are the interface.
"""

from __future__ import annotations

import importlib
from typing import Any

# another published package has the top-level name
if __name__ != "mnv4_ops.triton_kernels":
    raise ImportError(f"import this package as mnv4_ops.triton_kernels, not as {__name__}", name=__name__)

__all__ = ["Block", "Head", "MobileMQA", "mqa_attention", "tune"]


def __getattr__(name: str) -> Any:
    if name in ("Block", "Head"):
        return getattr(importlib.import_module(".block", __name__), name)
    if name == "MobileMQA":
        return importlib.import_module(".mqa_block", __name__).MobileMQA
    if name in ("link", "compile_ahead"):
        return getattr(importlib.import_module(".chain", __name__), name)
    if name == "mqa_attention":
        return importlib.import_module(".attention_op", __name__).mqa_attention
    if name == "tune":
        return importlib.import_module(".tuner", __name__).tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
