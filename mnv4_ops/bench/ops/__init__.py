"""The ops that are benchmarked, one file each: every `Op` with a name in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.ops.base import Case, Op
from mnv4_ops.spec import ConvSpec

__all__ = ["OPS", "Case", "Op", "blocks", "by_name", "select"]


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


def blocks(models: Sequence[str], resolution: int | None = None) -> list[tuple[Op, Case]]:
    """Every distinct block of some models in order of execution, each as the op that it is: what stands between two
    blocks of timm, not the convolutions inside of one. The last 1x1, the pool and all after it are one head.
    """
    head = by_name("head")
    found: dict[tuple[str, Any, int, int], list[str]] = {}
    for model in models:
        for row, spec, h, w in [*Op.rows(head, model, resolution), *head.rows(model, resolution)]:
            if row in ("4.0", "pool", "conv_head", "classifier"):
                continue
            if isinstance(spec, ConvSpec):
                name = "depthwise" if spec.depthwise else "dense" if spec.kernel > 1 else "pointwise"
            else:
                name = next(op.name for op in OPS if getattr(op, "kind", None) == spec.kind)
            found.setdefault((name, spec, h, w), []).append(f"{model} {row}")
    return [
        (by_name(name), Case(name, spec, h, w, by_name(name).shape(spec), tuple(places)))
        for (name, spec, h, w), places in found.items()
    ]
