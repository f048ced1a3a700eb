"""What the wrappers do with a call: find the plan, check it, run it; else the original forward, with the reason."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.profiler as _profiler
from torch import Tensor, nn

from mnv4_ops import _native, cache, graphs, traced
from mnv4_ops.adapters import TARGETS, Target
from mnv4_ops.adapters.record import Part, Recorder, Unsupported
from mnv4_ops.ops import conditions
from mnv4_ops.ops.cuda import NoFit, capturing

STRICT_VARIABLE = "MNV4_OPS_STRICT"
_local = threading.local()
_STALE, _STRUCTURE, _TRAINING, _HOOKS = 1, 2, 3, 4
_WORDS = {
    3: "a module is in training mode ({where})",
    4: "there are {where}",
    5: "a module has its own forward ({where})",
    6: "a parameter requires grad and grad mode is on ({where})",
}


class StrictError(RuntimeError):
    """A call ran, or would have run, its original forward where a kernel was expected."""


@dataclass
class Row:
    """One module of a report. `served` is None for modules that were not reached."""

    name: str
    cls: str
    served: bool | None
    by: str  # op and spec, or the reason
    spec: Any = None


@dataclass
class Report:
    """The answer of `explain`: `rows` in the order of the model; `served` and `fallbacks` are the rows by outcome."""

    rows: list[Row] = field(default_factory=list)
    events: list[tuple[Any, str, bool, str, Any]] = field(default_factory=list, repr=False)

    @property
    def served(self) -> list[Row]:
        return [row for row in self.rows if row.served]

    @property
    def fallbacks(self) -> list[Row]:
        return [row for row in self.rows if row.served is False]

    def finish(self, model: nn.Module, missing: str) -> Report:
        """Turns events into rows; `missing` is what is said of blocks without an event."""
        names = {id(module): name for name, module in model.named_modules()}
        reached = set()
        for module, method, served, reason, recipe in self.events:
            base = names.get(id(module), "?")
            reached.add(base)
            cls = type(module).__name__
            if not served:
                name = base if method == "forward" else f"{base}.{method}".lstrip(".")
                self.rows.append(Row(name or "(model)", cls, False, reason))
                continue
            for step in recipe:
                if isinstance(step, Part):
                    name = ".".join(filter(None, (base, step.name))) or "(model)"
                    reached.add(name)
                    self.rows.append(Row(name, cls, True, f"mnv4::{step.op}", step.spec))
                    if step.slot.endswith("+feat"):
                        reached.add(_last_block(model, base))
        targets = {(t.module, t.cls) for t in TARGETS if t.block}
        whole = {row.name for row in self.rows if row.served}
        for name, module in model.named_modules():
            kind = type(module)
            inside = "(model)" in whole or any(name[:i] in whole for i, char in enumerate(name) if char == ".")
            if (kind.__module__, kind.__name__) in targets and name not in reached and not inside:
                self.rows.append(Row(name or "(model)", kind.__name__, None, missing))
        order = {name: i for i, name in enumerate(names.values())}
        self.rows.sort(key=lambda row: -1 if row.name == "stem" else order.get(row.name, len(order)))
        self.events.clear()
        return self

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=0)
        lines = [f"{len(self.served)} parts served, {len(self.fallbacks)} original"]
        for row in self.rows:
            mark = {True: "fused", False: "original", None: "-"}[row.served]
            what = row.by if row.spec is None else f"{row.by}  {row.spec.kind}  {_short(row.spec)}"
            lines.append(f"{row.name:<{width}}  {mark:<8}  {what}")
        return "\n".join(lines)


def _short(spec: Any) -> str:
    c_in, c_out = spec.channels
    mid = getattr(spec, "c_mid", None)
    return f"{c_in}{f' -> {mid}' if mid else ''} -> {c_out}"


def _last_block(model: nn.Module, base: str) -> str:
    blocks = model.get_submodule(f"{base}.blocks" if base else "blocks")
    stage, last = list(blocks.named_children())[-1]
    return ".".join(filter(None, (base, "blocks", stage, list(last.named_children())[-1][0])))


@contextlib.contextmanager
def observe() -> Iterator[Report]:
    """Collects what the wrappers of this thread do."""
    before = getattr(_local, "report", None)
    _local.report = report = Report()
    pause = getattr(_native.core, "pause_lanes", lambda _: None)
    pause(1)
    try:
        yield report
    finally:
        pause(-1)
        _local.report = before


def _note(module: Any, method: str, served: bool, reason: str, recipe: Any = ()) -> None:
    _local.report.events.append((module, method, served, reason, recipe))


def _strict() -> bool:
    return os.environ.get(STRICT_VARIABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def _refuse(module: nn.Module, method: str, reason: str, expected: bool) -> None:
    """Called before an original forward."""
    if getattr(_local, "report", None) is not None:
        _note(module, method, False, reason)
    elif expected and _strict():
        raise StrictError(f"mnv4_ops: {type(module).__name__}.{method} would run its original forward: {reason}")


def _function(target: Target, plan: str) -> Any:
    return getattr(importlib.import_module(target.adapter), plan)


def describer(target: Target, cls: type, plan: str) -> Callable[[Recorder], Any]:
    def describe(rec: Recorder) -> Any:
        kind = type(rec.modules[0])
        function = _function(target, plan)
        if not target.block:
            return function(rec)
        if kind is not cls:
            raise Unsupported(f"{kind.__name__} is a subclass of {cls.__name__}")
        return function(rec, 0)

    return describe


def _checked(self: nn.Module, x: Tensor, name: str, describe: Any, grad: bool) -> tuple[cache.Plan | None, str | None]:
    """A plan that stands and goes with `x`, or the reason why the call is not for a kernel."""
    plan = cache.find(self, name)
    code = _STALE if plan is None else plan.guard.check(self, grad)
    if code in (_STALE, _STRUCTURE):
        if self.training:
            cache.trained()
            return None, _WORDS[3].format(where="the module itself")
        # do not pack for a model that is being trained
        if grad and any(p.requires_grad for p in self.parameters()):
            return None, _WORDS[6].format(where="parameters()")
        if capturing(x):
            return (
                None,
                "a CUDA graph is being captured and the weights are not packed yet: call the module once before",
            )
        plan = cache.renew(self, name, describe)
        code = plan.guard.check(self, grad)
        if code in (_STALE, _STRUCTURE):
            return None, f"{plan.guard.where()} changes while it is being packed"
    assert plan is not None
    if plan.reason is not None and plan.hooked and code != _HOOKS and not capturing(x):
        # what a hook had put in the place of a parameter (pruning, the older weight norm) is gone
        plan = cache.renew(self, name, describe, force=True)
        code = plan.guard.check(self, grad)
    if plan.reason is not None:
        plan.hooked = code == _HOOKS
        return plan, plan.reason
    if code != 0:
        if code == _TRAINING:
            cache.trained()
        return plan, _WORDS[code].format(where=plan.guard.where())
    return plan, plan.mismatch(x)


def _ranged(ops: Sequence[str], run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """While a profiler looks on: under the name of the op, or `mnv4::program` with the names of all."""
    with _profiler.record_function(f"mnv4::{ops[0] if len(ops) == 1 else 'program'}", " ".join(ops)):
        return run(x)


def _ops(plan: cache.Plan) -> list[str]:
    return [part.op for part in plan.recipe if isinstance(part, Part)]


def _fits(x: Tensor, c_in: int) -> str | None:
    _, c, h, w = x.shape
    if (c == c_in or not c_in) and h and w:
        return None
    return f"the input has shape {tuple(x.shape)}, expected [N, {c_in}, H, W]"


def block(target: Target, cls: type, original: Any) -> Callable[[Any, Any], Any]:
    """The wrapper's work for a block."""
    name = target.plans[0]
    describe = describer(target, cls, name)
    reason_of, grad_enabled, find = conditions.reason, torch.is_grad_enabled, cache.find

    def run(self: Any, x: Any) -> Any:
        grad = grad_enabled()
        reason = reason_of(x, grad)
        if reason is None:
            plan: Any = find(self, name)
            if (
                plan is None
                or plan.reason is not None
                or plan.guard.check(self, grad)
                or x.dtype is not plan.dtype
                or x.get_device() != plan.index
            ):
                plan, reason = _checked(self, x, name, describe, grad)
            if reason is None:
                _, c, h, w = x.shape
                if not (c == plan.c_in and h and w) or (plan.refuses is not None and plan.refuses(h, w)):
                    return original(self, x)
                try:
                    out = _ranged(_ops(plan), plan.run, x) if _profiler._is_profiler_enabled else plan.run(x)
                except NoFit as error:
                    reason = str(error)
                else:
                    if getattr(_local, "report", None) is not None:
                        _note(self, "forward", True, "", plan.recipe)
                    return out
        _refuse(self, "forward", reason, expected=True)
        return original(self, x)

    return run


def extra(target: Target, original: Any) -> Callable[[Any, Any, Any], Any]:
    """The wrapper's work for a block that is called with the argument that no kernel takes."""

    def run(self: Any, x: Any, value: Any) -> Any:
        _refuse(self, "forward", f"{target.extra} is given", expected=True)
        return original(self, x, value)

    return run


def laned(target: Target) -> bool:
    """Whether a method is the forward of a whole model, which may have a short way (`cache.lanes`)."""
    return not target.block and target.plans == ("forward",)


def model(target: Target, cls: type, original: Any) -> Callable[..., Any]:
    """The wrapper's work for a method of a whole model."""
    describers = [describer(target, cls, plan) for plan in target.plans]
    pyramid = "feature_pyramid" in target.plans
    graphed = target.method in graphs.METHODS
    learns = laned(target)

    def run(self: Any, x: Any, *flags: Any) -> Any:
        which = 1 if flags and flags[0] else 0
        name = target.plans[which]
        grad = torch.is_grad_enabled()
        reason = conditions.reason(x, grad)
        plan: cache.Plan | None = None
        if reason is None:
            plan, reason = _checked(self, x, name, describers[which], grad)
            if reason is None:
                assert plan is not None
                if _fits(x, plan.c_in) is not None:
                    return original(self, x, *flags)
                observed = getattr(_local, "report", None) is not None
                try:
                    if plan.run is None or pyramid:
                        out = _walk(self, plan, x, pyramid)
                    elif graphed and not observed and graphs.wanted(self):
                        out = graphs.run(self, name, plan.program, x)
                    else:
                        out = _ranged(_ops(plan), plan.run, x) if _profiler._is_profiler_enabled else plan.run(x)
                        if learns and not grad and not observed:
                            cache.learn(self, plan, x, out)
                except NoFit as error:
                    reason = str(error)
                else:
                    if observed:
                        _note(self, target.method, True, "", plan.recipe)
                    return out
        # a model of another structure is no fallback: its blocks speak for themselves
        _refuse(self, target.method, reason, expected=plan is None or plan.reason is None)
        return original(self, x, *flags)

    return run


def _walk(self: Any, plan: cache.Plan, x: Any, pyramid: bool) -> Any:
    features = []
    for step in plan.steps:
        if step.program is not None:
            if (
                conditions.reason(x, torch.is_grad_enabled()) is None
                and _fits(x, step.program.c_in) is None
                and plan.mismatch(x) is None
            ):
                run = step.program.run
                x = _ranged(step.ops, run, x) if _profiler._is_profiler_enabled else run(x)
            else:
                for ref in step.fallback:
                    x = _alive(ref)(x)
                if step.method is not None:
                    x = getattr(self, step.method)(x)
        elif step.module is not None:
            x = _alive(step.module)(x)
        else:
            assert step.method is not None
            x = getattr(self, step.method)(x)
        if step.emit:
            features.append(x)
    return features if pyramid else x


def _alive(ref: Any) -> nn.Module:
    module = ref()
    assert module is not None  # the guard has just found it in its place
    return module


def compiled(target: Target, cls: type, original: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper's work under torch.compile; `run` is that without."""

    def short(self: Any, x: Any) -> Any:
        lane = cache.lanes.get(id(self))
        out = None if lane is None else lane(self, x)
        return run(self, x) if out is None else out

    describers = [describer(target, cls, plan) for plan in target.plans]
    return traced.forward(target, original, describers, short if laned(target) else run)
