"""Where the kernels in Gluon may run, and the assembler that they need.

ptxas of CUDA 12.8, which triton 3.6 uses for Hopper, takes the stack pointer for the address of a tile in shared memory
where such an address is added to a constant and both have been hoisted out of a loop: the product reads outside of
shared memory. That of CUDA 12.9, which triton ships beside it for other GPUs, does not.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import triton
from triton import knobs

SOUND = (12, 9)
# versions of Triton by which the kernels have passed their tests on a GPU
TESTED = ("3.6", "3.7", "3.8")
T = TypeVar("T")
_lock = threading.RLock()


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))


def series() -> str:
    """Of Triton, as in "3.8"."""
    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def _assembler() -> str | None:
    """Path of an assembler that is new enough, "" where the usual one is, None without."""
    for name in ("ptxas", "ptxas_blackwell"):
        try:
            tool = getattr(knobs.nvidia, name)
        except (AttributeError, RuntimeError):
            continue
        if _version(tool) >= SOUND:
            return "" if name == "ptxas" else tool.path
    return None


def unavailable() -> str | None:
    """Why the kernels are not used, None where they are.

    They are where all GPUs are Hopper's, Triton is one with which the kernels have been tested, and an assembler is
    there. MNV4_OPS_GLUON=0 forbids them, MNV4_OPS_GLUON=1 allows them with any Triton.
    """
    wanted = os.environ.get("MNV4_OPS_GLUON", "")
    if wanted == "0":
        return "MNV4_OPS_GLUON=0"
    if knobs.runtime.interpret:
        return "Triton's interpreter is on"
    count = torch.cuda.device_count() if torch.version.cuda is not None else 0
    if count == 0 or any(torch.cuda.get_device_capability(i) != (9, 0) for i in range(count)):
        return "not all GPUs have compute capability 9.0"
    if wanted != "1" and series() not in TESTED:
        return f"tested with triton {', '.join(TESTED)}, this is {triton.__version__} (MNV4_OPS_GLUON=1 allows it)"
    try:
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    except ImportError as error:
        return f"no Gluon in triton {triton.__version__}: {error}"
    if _assembler() is None:
        return f"no ptxas >= {'.'.join(map(str, SOUND))} in triton {triton.__version__}"
    return None


@functools.cache
def available() -> bool:
    """Whether the kernels are used."""
    return unavailable() is None


@contextlib.contextmanager
def _sound() -> Iterator[None]:
    path = _assembler()
    if not path:
        yield
        return
    with _lock, knobs.nvidia.scope():
        # the version is part of the keys of all kernels in the cache, and asked for once: let it be the usual one
        with contextlib.suppress(ImportError, AttributeError):
            from triton.backends.nvidia.compiler import get_ptxas_version

            get_ptxas_version(90)
        knobs.nvidia.ptxas = path
        yield


def compiled_soundly(kernel: Any, call: Callable[[], T]) -> T:
    """`call()`, which compiles the kernel: if that is one in Gluon, here and now and by the right assembler.

    Not by another thread later, as compiling ahead would have it, when the usual one would be back.
    """
    if not getattr(kernel, "is_gluon", bool)():
        return call()

    def run() -> T:
        with _sound():
            return call()

    return contextvars.Context().run(run)


def tile_layout(columns: int) -> Any:
    """How rows of 16-bit values lie in shared memory for the copy engine and the tensor cores."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(min(2 * columns, 128), 16)


__all__ = ["available", "compiled_soundly", "series", "tile_layout", "unavailable"]
