"""The CPU backend: native blocks built from a checked layout, packed from torch tensors, run on torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mnv4_ops import _native

from .layout import PER_STAGE, Layout, Params, empty_output

EXACT = True

_CPU = torch.device("cpu")
# what the native classes of a dtype begin with
_PREFIX = {torch.float32: "", torch.float16: "Half", torch.bfloat16: "BFloat16"}


def unavailable() -> str | None:
    """Why there are no CPU kernels, or None."""
    return None if _native.core is not None else f"the native library is not loaded: {_native.reason}"


def build(layout: Layout) -> Any:
    """The native block or head of a layout, without parameters. ValueError where the kernels have no such block."""
    core = _native.core
    if core is None:
        raise RuntimeError(f"mnv4::{layout.op}: {unavailable()}")
    return getattr(core, _PREFIX[layout.dtype or torch.float32] + layout.native_class)(**dict(layout.native))


def _dense(t: Tensor | None) -> Tensor | None:
    # channels_last models hold dense k x k weights in other strides, 16-bit ones are packed from float32; the copy
    # lives only while packing
    return None if t is None else t.detach().resolve_neg().float().contiguous()


def pack(native: Any, layout: Layout, params: Params, eps: Sequence[float]) -> bool:
    """Folds and packs all stages; a block that is packed already keeps its buffer. True: it is done."""
    for stage, base in layout.stages:
        tensors = [_dense(t) for t in params[base : base + len(PER_STAGE)]]
        gamma = _dense(params[layout.gamma]) if stage == layout.gamma_stage and layout.gamma is not None else None
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        native.pack(stage, *addresses, eps[base // len(PER_STAGE)], 0 if gamma is None else gamma.data_ptr())
    return True


def run(native: Any, layout: Layout, x: Tensor) -> Tensor:
    """Runs one packed block on a checked input."""
    out = empty_output(layout, x)
    n, _, h, w = x.shape
    if n:
        native.run(x.data_ptr(), n, h, w, x.stride(), out.data_ptr(), torch.get_num_threads())
    return out


def runner(native: Any, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The short way to `run`, for inputs that were found right."""
    shape_of, start, threads = layout.output_shape, native.run, torch.get_num_threads
    dtype = layout.dtype or torch.float32

    def run(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        out = torch.empty(
            shape_of(n, h, w), dtype=dtype, device=_CPU, memory_format=torch.channels_last
        )  # fmt: skip
        if n:
            start(x.data_ptr(), n, h, w, x.stride(), out.data_ptr(), threads())
        return out

    return run


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """softmax(scale q k^T) v of checked tensors [B, heads, rows, channels]; those of 16 bits are copied to float32."""
    core = _native.core
    assert core is not None
    if q.dtype is not torch.float32:
        wide = out.float()
        attention(q.float(), k.float(), v.float(), scale, wide)
        out.copy_(wide)
        return
    tensors = [argument for t in (q, k, v, out) for argument in (t.data_ptr(), t.stride())]
    n, heads, nq, key_dim = q.shape
    core.attention(*tensors, n, heads, nq, k.shape[2], key_dim, v.shape[3], scale, torch.get_num_threads())


def statistics(layout: Layout, params: Params) -> Any:
    """Hash of all running statistics: a train-mode forward moves them without a new version."""
    assert _native.core is not None
    found = [params[base + i] for _, base in layout.stages for i in (4, 5)]
    arrays = [t.detach().float().contiguous() for t in found if t is not None]
    return _native.core.checksum([(t.data_ptr(), t.numel()) for t in arrays])


def watch(parts: Sequence[tuple[Layout, Params]]) -> Callable[[], Any]:
    """The like for many layouts at once, to be called again and again while the tensors stay where they are."""
    assert _native.core is not None
    found = [params[base + i] for layout, params in parts for _, base in layout.stages for i in (4, 5)]
    tensors = [t for t in found if t is not None]
    if not all(t.is_contiguous() and t.dtype is torch.float32 for t in tensors):
        return lambda: [statistics(layout, params) for layout, params in parts]
    checksum, arrays = _native.core.checksum, [(t.data_ptr(), t.numel()) for t in tensors]
    return lambda: checksum(arrays)


class Program:
    """Blocks back to back in one native call, with the shapes it has met."""

    def __init__(self, parts: Sequence[tuple[Any, Layout]]) -> None:
        assert _native.core is not None
        self.natives = tuple(native for native, _ in parts)
        self.dtype = next((layout.dtype for _, layout in parts if layout.dtype is not None), torch.float32)
        self.native = getattr(_native.core, _PREFIX[self.dtype] + "Program")(list(self.natives))
        self.c_in = parts[0][1].c_in
        self._shapes: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def run(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        shape = self._shapes.get((n, h, w))
        if shape is None:
            shape = self._meet(n, h, w)
        if len(shape) == 4:
            out = torch.empty(shape, dtype=self.dtype, device=_CPU, memory_format=torch.channels_last)
        else:
            out = torch.empty(shape, dtype=self.dtype, device=_CPU)
        if n:
            self.native.forward(x.data_ptr(), n, h, w, x.stride(), out.data_ptr(), torch.get_num_threads())
        return out

    def _meet(self, n: int, h: int, w: int) -> tuple[int, ...]:
        if len(self._shapes) >= 64:
            self._shapes.clear()
        shape: tuple[int, ...] = self.native.output_shape(n, h, w)
        self._shapes[n, h, w] = shape
        return shape


program = Program
