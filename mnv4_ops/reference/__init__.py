"""Plain PyTorch MobileNetV4: `functional` is the definition of correct; `models` takes and gives timm's weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "functional": "",
    "modules": "",
    "models": "",
    "init": "",
    "MobileNetV4": "models",
    "create_model": "models",
    "list_models": "models",
    "ConvBNAct": "modules",
    "UIB": "modules",
    "FusedIB": "modules",
    "MobileMQA": "modules",
    "randomize_": "init",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    # lazy, because `mnv4_ops.spec` reads `definitions` from this package and must not import torch
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_WHERE[name] or name}")
    return getattr(module, name) if _WHERE[name] else module


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
