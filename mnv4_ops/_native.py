"""Loads the native library, or records why it could not be loaded.

``core`` is the module ``mnv4_ops._core``, or None; then ``reason`` says why and every forward is the original one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

SKIP_VARIABLE = "MNV4_OPS_SKIP_NATIVE"
ISA_VARIABLE = "MNV4_OPS_CPU_ISA"

core: ModuleType | None = None
reason: str | None = None

_NAME = "mnv4_ops._core"
_HOW_TO_INSTALL = (
    "mnv4_ops is being imported from a source tree that has no native library beside it. "
    "Install it with `pip install .` (or `pip install -e .`) in that tree, and start Python elsewhere; "
    f"{SKIP_VARIABLE}=1 imports it without the native library."
)


def env_flag(name: str) -> bool:
    """True if the environment variable `name` is set to anything but 0, false, no, off or nothing."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def _files_for_other_pythons() -> list[str]:
    folder = Path(__file__).parent
    return sorted(path.name for pattern in ("_core*.so", "_core*.pyd") for path in folder.glob(pattern))


def _load() -> tuple[ModuleType | None, str | None]:
    if env_flag(SKIP_VARIABLE):
        return None, f"{SKIP_VARIABLE} is set"
    if importlib.util.find_spec(_NAME) is None:
        others = _files_for_other_pythons()
        if not others:
            raise ImportError(_HOW_TO_INSTALL, name=_NAME)
        tag = sys.implementation.cache_tag
        return None, f"it was built for another Python or platform: found {', '.join(others)}, this is {tag}"
    try:
        return importlib.import_module(_NAME), None
    except Exception as error:  # a damaged library can fail in any way
        return None, f"{type(error).__name__}: {error}"


def _apply_isa(native: ModuleType) -> None:
    tier = os.environ.get(ISA_VARIABLE, "").strip()
    if not tier:
        return
    try:
        native.set_tier(tier)
    except ValueError as error:
        raise ValueError(f"{ISA_VARIABLE}={tier!r}: {error}") from None


core, reason = _load()
if core is not None:
    _apply_isa(core)
elif not env_flag(SKIP_VARIABLE):
    warnings.warn(
        f"mnv4_ops: the native library could not be loaded, models run their original forwards ({reason})",
        RuntimeWarning,
        stacklevel=3,
    )
