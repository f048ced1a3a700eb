"""Fused inference kernels for MobileNetV4 in PyTorch.

>>> import mnv4_ops
>>> mnv4_ops.enable()  # MobileNetV4 models, built before or later, now run fused kernels where they can
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from mnv4_ops import _native

if TYPE_CHECKING:
    from mnv4_ops import ops, reference, spec
    from mnv4_ops.native_export import export, load_native_library, native_library
    from mnv4_ops.patch import disable, enable, explain, repack

__all__ = [
    "__version__",
    "disable",
    "enable",
    "explain",
    "export",
    "load_native_library",
    "native_library",
    "ops",
    "reference",
    "repack",
    "spec",
]

_MODULES = ("ops", "reference", "spec")
_FUNCTIONS = dict.fromkeys(("disable", "enable", "explain", "repack"), "mnv4_ops.patch")
_FUNCTIONS |= dict.fromkeys(("export", "load_native_library", "native_library"), "mnv4_ops.native_export")


def _version() -> str:
    try:
        return importlib.metadata.version("mnv4-ops")
    except importlib.metadata.PackageNotFoundError:
        # a source tree with a library built in place
        return _native.core.build_info()["version"] if _native.core is not None else "0+unknown"


__version__ = _version()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mnv4_ops.{name}")
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mnv4_ops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
