"""The GPU backend: Triton blocks built from a checked layout, packed from torch tensors, run on torch tensors.

Everything is started on torch's current stream of the input's device. Triton is imported with the first block.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mnv4_ops import _native

from .layout import PER_STAGE, Layout, Params, empty_output

# the contents of statistics can only be had by waiting for the GPU
EXACT = False
TORCH, TRITON, CAPABILITY = (2, 10), (3, 6), (8, 0)


class NoFit(RuntimeError):
    """No configuration of a kernel fits on this GPU."""


def _at_least(version: str, wanted: tuple[int, ...]) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= wanted


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _no_software() -> str | None:
    if _native.core is None:
        return f"the native library is not loaded: {_native.reason}"
    if not _at_least(torch.__version__, TORCH):
        return f"GPU kernels need torch >= {_words(TORCH)}, this is {torch.__version__}"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        try:
            version = importlib.metadata.version("pytorch-triton")
        except importlib.metadata.PackageNotFoundError:
            return f"GPU kernels need triton >= {_words(TRITON)}, which is not installed"
    if not _at_least(version, TRITON):
        return f"GPU kernels need triton >= {_words(TRITON)}, this is {version}"
    return None


def _no_device() -> str | None:
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"this torch ({torch.__version__}) is built without GPU support"
    if not torch.cuda.is_available():
        return "torch sees no GPU: no device, or no driver for it"
    return None


def too_old(index: int) -> str | None:
    """Why one of the GPUs cannot run the kernels, or None."""
    if getattr(torch.version, "hip", None) is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return f"GPU kernels need compute capability {_words(CAPABILITY)}, cuda:{index} ({name}) has {_words(capability)}"


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why there are no GPU kernels in this process, or None."""
    reason = _no_software() or _no_device()
    if reason is None:
        reasons = [too_old(index) for index in range(torch.cuda.device_count())]
        reason = None if None in reasons else "; ".join(r for r in reasons if r)
    if reason is None:
        try:
            kernels()
        except Exception as error:  # a damaged installation can fail in any way
            reason = f"the GPU kernels could not be loaded: {type(error).__name__}: {error}"
    return reason


def kernels() -> Any:
    """What has the classes `Block`, `Head` and `MobileMQA`."""
    module = importlib.import_module("mnv4_ops.triton_kernels")
    module.Block, module.Head  # noqa: B018 - imported on first use
    return module


def allow_tf32() -> bool:
    """Torch's setting for fp32 convolutions on the GPU."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    # the older name raises where the newer ones were used
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


def precision() -> int:
    """Torch's settings for fp32 as the kernels take them: 1 TF32 in convolutions, 2 in linear layers."""
    matmul = torch.backends.cuda.matmul
    linear = getattr(matmul, "fp32_precision", None)
    linear_tf32 = bool(matmul.allow_tf32) if linear is None else linear == "tf32"
    return allow_tf32() + 2 * linear_tf32


def capturing(x: Tensor) -> bool:
    """Whether what runs on `x` now goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device | None) -> Any:
    """Makes a GPU the current one for a while, if it is not."""
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def build(layout: Layout) -> Any:
    """The block or head of a layout, without parameters. ValueError where there is no kernel for it."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"mnv4::{layout.op}: {reason}")
    device = layout.device
    assert device is not None
    if device.type == "cuda" and (reason := too_old(device.index or 0)) is not None:
        raise ValueError(f"mnv4::{layout.op}: {reason}")
    module = kernels()
    # tensors made in inference mode could not be filled again outside of it
    with torch.inference_mode(False), on_device(device):
        return getattr(module, layout.native_class)(dtype=layout.dtype, device=device, **dict(layout.native))


def pack(native: Any, layout: Layout, params: Params, eps: Sequence[float]) -> bool:
    """Folds and packs all stages on the device; a block that is packed already keeps its memory.

    Waits for the device, so that any stream may use the block afterwards, and returns True; in a capture, False.
    """
    with torch.inference_mode(False), torch.no_grad(), on_device(layout.device):
        for stage, base in layout.stages:
            tensors = [None if t is None else t.detach() for t in params[base : base + len(PER_STAGE)]]
            gamma = params[layout.gamma] if layout.gamma is not None and stage == layout.gamma_stage else None
            native.pack(stage, *tensors, eps[base // len(PER_STAGE)], None if gamma is None else gamma.detach())
        if layout.device is not None and layout.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.current_stream().synchronize()
    return True


def _start(native: Any, x: Tensor, out: Tensor, tf32: int) -> None:
    try:
        native.run(x, out, allow_tf32=tf32)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise NoFit(f"no configuration of a kernel fits on {x.device}: {error}") from error
        raise


def run(native: Any, layout: Layout, x: Tensor) -> Tensor:
    """Runs one packed block on a checked input."""
    out = empty_output(layout, x)
    if x.shape[0]:
        with on_device(x.device):
            _start(native, x, out, precision() if x.dtype is torch.float32 else 0)
    return out


def runner(native: Any, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The short way to `run`, for inputs that were found right."""
    return Program([(native, layout)]).run


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """softmax(scale q k^T) v of checked tensors [B, heads, rows, channels]."""
    with on_device(q.device):
        kernels().mqa_attention(q, k, v, scale, out, allow_tf32=precision() if q.dtype is torch.float32 else 0)


def statistics(layout: Layout, params: Params) -> Any:
    """Hash of all running statistics: a train-mode forward moves them without a new version. Waits for the device."""
    found = [params[base + i] for _, base in layout.stages for i in (4, 5)]
    parts = [t.detach().double().flatten() for t in found if t is not None]
    if not parts:
        return 0
    return hashlib.blake2b(torch.cat(parts).cpu().numpy().tobytes(), digest_size=16).digest()


class Program:
    """Blocks back to back on the current stream, with the shapes it has met. `run` raises NoFit."""

    def __init__(self, parts: Sequence[tuple[Any, Layout]]) -> None:
        self.natives = tuple(native for native, _ in parts)
        first = parts[0][1]
        self.c_in, self._dtype, self._device = first.c_in, first.dtype, first.device
        self._layouts = [layout for _, layout in parts]
        self._exact = self._dtype is not torch.float32
        self._shapes: dict[tuple[int, int, int], list[tuple[Any, tuple[int, ...], torch.memory_format]]] = {}
        ready = self._device is not None and self._device.type == "cuda"
        module = kernels() if ready else None
        self._chain: Any = getattr(module, "link", None)
        self._ahead: Any = getattr(module, "compile_ahead", None)
        self._chains: dict[tuple[Any, ...], Any] = {}

    def run(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self._run(x)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tf32 = 0 if self._exact else precision()
        chain = self._chains.get((n, h, w, tf32, x.stride()))
        if chain is not None and not x.data_ptr() % 16:
            return chain.run(x)
        steps = self._shapes.get((n, h, w))
        if steps is None:
            steps = self._meet(n, h, w)
            if n and self._ahead is not None:
                self._ahead(self.natives, x, tf32)
        dtype, device, empty = self._dtype, self._device, torch.empty
        if not n:
            return empty(steps[-1][1], dtype=dtype, device=device, memory_format=steps[-1][2])
        given = x
        for native, shape, memory_format in steps:
            out = empty(shape, dtype=dtype, device=device, memory_format=memory_format)
            _start(native, x, out, tf32)
            x = out
        if self._chain is not None:
            self._link(given, tf32)
        return x

    def _link(self, x: Tensor, tf32: int) -> None:
        """After a run: all launches as one list, for the next one."""
        chain = self._chain(self.natives, x, tf32)
        if chain is not None:
            if len(self._chains) >= 64:
                self._chains.clear()
            n, _, h, w = x.shape
            self._chains[n, h, w, tf32, x.stride()] = chain

    def _meet(self, n: int, h: int, w: int) -> list[tuple[Any, tuple[int, ...], torch.memory_format]]:
        if len(self._shapes) >= 64:
            self._shapes.clear()
        steps = []
        size = (n, h, w)
        for native, layout in zip(self.natives, self._layouts, strict=True):
            shape = layout.output_shape(*size)
            pooled = len(shape) == 2
            steps.append((native, shape, torch.contiguous_format if pooled else torch.channels_last))
            if not pooled:
                size = (n, shape[2], shape[3])
        self._shapes[n, h, w] = steps
        return steps


program = Program
