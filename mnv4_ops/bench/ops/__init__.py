"""The ops that are benchmarked, one file each: every `Op` with a name in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.ops.base import Case, Op

__all__ = ["OPS", "Case", "Op", "by_name", "select"]


def _found() -> Iterator[Op]:
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        name = f"{__name__}.{module.name}"
        for value in vars(importlib.import_module(name)).values():
            own = isinstance(value, type) and value.__module__ == name
            if own and issubclass(value, Op) and hasattr(value, "name"):
                yield value()


OPS: tuple[Op, ...] = tuple(sorted(_found(), key=lambda op: (op.order, op.name)))


def by_name(name: str) -> Op:
    """The op of that name; KeyError."""
    return {op.name: op for op in OPS}[name]


def select(names: list[str]) -> list[Op]:
    """Ops for names, or for `all`."""
    known = {op.name: op for op in OPS}
    chosen: list[Op] = []
    for name in names:
        if name != "all" and name not in known:
            raise BenchError(f"--ops: expected one of all, {', '.join(known)}, got {name!r}")
        chosen += [op for op in (OPS if name == "all" else (known[name],)) if op not in chosen]
    if not chosen:
        raise BenchError("--ops: expected at least one op")
    return chosen
