"""What is done as soon as a module has been imported, by whoever that does."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

Done = Callable[[types.ModuleType], None]
_waiting: dict[str, list[Done]] = {}


class _Hook(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for as the other finders do; on `sys.meta_path` while there are any."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    _extend(spec.loader)
                return spec
        return None


_hook = _Hook()


def _extend(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: types.ModuleType) -> None:
        execute(module)
        for done in _waiting.get(module.__name__, [])[:]:
            done(module)

    loader.exec_module = exec_module


def watch(name: str, done: Done) -> None:
    """Calls `done(module)` after each import of this name, until `ignore`."""
    wanted = _waiting.setdefault(name, [])
    if done not in wanted:
        wanted.append(done)
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)


def ignore(name: str, done: Done) -> None:
    wanted = _waiting.get(name, [])
    if done in wanted:
        wanted.remove(done)
    if not wanted:
        _waiting.pop(name, None)
    if not _waiting and _hook in sys.meta_path:
        sys.meta_path.remove(_hook)


def once(name: str, done: Done) -> None:
    """Calls `done(module)` now if the module has been imported, else after its import."""
    module = sys.modules.get(name)
    if module is not None:
        done(module)
        return

    def then(module: types.ModuleType) -> None:
        ignore(name, then)
        done(module)

    watch(name, then)
