"""Blocks back to back as one list of launches: what an eager forward of a whole model runs.

All intermediates lie in one allocation, at offsets that are planned once for an input geometry, so that a forward costs
two allocations and its launches. The arguments of launches that touch neither input nor output are kept as long as the
allocator gives the same address again.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .block import Block, Head, Plan
from .launch import Mappings, current_stream, described, direct, interpreted
from .plan import place

X, OUT, ARENA, FIXED = range(4)
Grid = tuple[int, int, int]


def _resolved(base: Sequence[int], addresses: list[tuple[int, int]], mapped: Mappings) -> list[Any]:
    """A kernel's first arguments."""
    return described([base[region] + offset for region, offset in addresses], mapped)


class Chain:
    """Ready plans of consecutive blocks for one geometry."""

    def __init__(
        self, natives: Sequence[Block | Head], plans: Sequence[Plan], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.plans = tuple(plans)
        dtype, device = natives[0].dtype, natives[0].device
        last = len(plans) - 1
        buffers: list[tuple[int, int, int]] = []
        for i, (plan, shape) in enumerate(zip(plans, shapes, strict=True)):
            buffers.append((torch.Size(shape).numel() * dtype.itemsize if i < last else 0, i, i + 1))
            buffers.append((plan.scratch, i, i))
        offsets, size = place(buffers)
        self._size, self._device = size, device
        self._shape, self._dtype = shapes[-1], dtype
        self._format = torch.contiguous_format if len(shapes[-1]) == 2 else torch.channels_last
        self._steps: list[tuple[Any, Grid, tuple[Any, ...], list[tuple[int, int]], Mappings, tuple[Any, ...]]] = []
        for i, plan in enumerate(plans):
            where = {
                None: (FIXED, 0),
                "x": (X, 0) if i == 0 else (ARENA, offsets[2 * i - 2]),
                "out": (OUT, 0) if i == last else (ARENA, offsets[2 * i]),
                "scratch": (ARENA, offsets[2 * i + 1]),
            }
            for launch in plan.launches:
                run, grid, head, pointers, tail = direct(launch)
                addresses = [(where[name][0], where[name][1] + offset) for name, offset in pointers]
                self._steps.append((run, grid, head, addresses, launch.mapped, tail))
        # (address of the arena, [(run, grid, arguments or None)])
        self._bound: tuple[int, list[tuple[Any, Grid, tuple[Any, ...] | None]]] | None = None

    def _bind(self, arena: int) -> list[tuple[Any, Grid, tuple[Any, ...] | None]]:
        base = (0, 0, arena, 0)
        bound = []
        for run, grid, head, addresses, mapped, tail in self._steps:
            ends = any(region in (X, OUT) for region, _ in addresses)
            bound.append((run, grid, None if ends else (*head, *_resolved(base, addresses, mapped), *tail)))
        self._bound = (arena, bound)
        return bound

    def run(self, x: Tensor) -> Tensor:
        """On the current stream of the device of `x`, which is the current one."""
        empty = torch.empty
        memory = empty(self._size, dtype=torch.uint8, device=self._device)
        out = empty(self._shape, dtype=self._dtype, device=self._device, memory_format=self._format)
        arena = memory.data_ptr()
        kept = self._bound
        bound = kept[1] if kept is not None and kept[0] == arena else self._bind(arena)
        base = (x.data_ptr(), out.data_ptr(), arena, 0)
        stream = current_stream(x.device.index)
        for i, (run, grid, args) in enumerate(bound):
            if args is None:
                _, _, head, addresses, mapped, tail = self._steps[i]
                args = (*head, *_resolved(base, addresses, mapped), *tail)
            run(*grid, stream, *args)
        return out


def link(natives: Sequence[Block | Head], x: Tensor, allow_tf32: int) -> Chain | None:
    """The blocks as one list; None until each has run with this geometry, or where `x` has to be copied first."""
    strides = natives[0].reads(x)
    if strides is False:
        return None
    n, _, h, w = x.shape
    plans, shapes = [], []
    for i, native in enumerate(natives):
        plan = native.ready(n, h, w, allow_tf32, strides if i == 0 else None)
        if plan is None:
            return None
        plans.append(plan)
        shapes.append(native.output_shape(n, h, w))
        h, w = shapes[-1][2:] if len(shapes[-1]) == 4 else (1, 1)
    return Chain(natives, plans, shapes)


def compile_ahead(natives: Sequence[Block | Head], x: Tensor, allow_tf32: int) -> None:
    """Compiles what a first run of the blocks will need, several kernels at a time. What fails is met again there."""
    if interpreted() or not x.is_cuda:
        return
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return
    # a context of its own: the mode must not outlive an error
    contextvars.copy_context().run(_compile_all, AsyncCompileMode, natives, x, allow_tf32)


def _compile_all(mode: Any, natives: Sequence[Block | Head], x: Tensor, allow_tf32: int) -> None:
    strides = natives[0].reads(x)
    n, _, h, w = x.shape
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    with contextlib.suppress(Exception), pool, mode(pool, ignore_errors=True):
        for i, native in enumerate(natives):
            for launch in native.prepare(n, h, w, allow_tf32, (strides or None) if i == 0 else None).launches:
                launch.compile()
            shape = native.output_shape(n, h, w)
            h, w = shape[2:] if len(shape) == 4 else (1, 1)
