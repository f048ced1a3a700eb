"""Which backend serves a device.

A backend is a module with

    unavailable() -> str | None                 why there are no kernels here
    build(layout) -> native                     ValueError for what has no kernel
    pack(native, layout, params, eps) -> bool   again: refills in place; False: only once a CUDA graph is replayed
    run(native, layout, x) -> Tensor            of a checked input
    program(parts) -> Program                   (native, layout) back to back; `.run(x)`, `.natives`, `.c_in`
    runner(native, layout) -> (x) -> Tensor     the short way for one block
    attention(q, k, v, scale, out)              `mqa_attention` of checked tensors
    statistics(layout, params) -> key           of the contents of all running statistics
    EXACT                                       whether that is cheap enough for every call of a raw op
    watch(parts) -> () -> key                   the statistics of many (layout, params); only where EXACT
"""

from __future__ import annotations

from typing import Any

from . import cpu, cuda

# by type of device
BY_DEVICE: dict[str, Any] = {"cpu": cpu, "cuda": cuda}
