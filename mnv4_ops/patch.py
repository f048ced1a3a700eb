"""enable, disable, explain, repack: one wrapper per class, set on the class while anything is enabled.

The wrappers consult a switch; instances are never written to. A call that no kernel can serve runs the original
forward, and `explain` says why; with MNV4_OPS_STRICT=1 it is an error where a kernel is expected.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mnv4_ops import _native, cache, graphs, imports, serve, traced
from mnv4_ops.adapters import TARGETS, Target

__all__ = ["Handle", "disable", "enable", "explain", "repack"]

_lock = threading.RLock()


class _Switch:
    """What is enabled. `everything` and `ids` are read by every wrapped call, the rest only under the lock."""

    def __init__(self) -> None:
        self.everything = False
        self.ids: dict[int, weakref.ref[nn.Module]] = {}
        self.base: set[_Scope] = set()
        self.scopes: list[_Scope] = []

    def recompute(self) -> None:
        active = [*self.base, *self.scopes]
        ids: dict[int, weakref.ref[nn.Module]] = {}
        for scope in active:
            ids.update(scope.ids)
        self.ids = ids
        self.everything = any(scope.everything for scope in active)
        recording = [scope for scope in active if scope.graphs]
        graphs.choose(any(scope.everything for scope in recording), {key for scope in recording for key in scope.ids})

    @property
    def on(self) -> bool:
        return self.everything or bool(self.ids)


class _Scope:
    """The modules of one enable call; `everything` without a model."""

    def __init__(self, model: nn.Module | None, cuda_graphs: bool = False) -> None:
        self.everything = model is None
        self.graphs = cuda_graphs
        self.ids: dict[int, weakref.ref[nn.Module]] = {}
        for module in () if model is None else model.modules():
            self.ids[id(module)] = weakref.ref(module, self._gone(id(module)))

    def _gone(self, key: int) -> Callable[[Any], None]:
        def gone(ref: Any) -> None:
            # the id may be given to another module from now on
            for ids in (self.ids, _switch.ids):
                if ids.get(key) is ref:
                    del ids[key]

        return gone


_switch = _Switch()


class Handle:
    """What `enable` returns. As a context manager it undoes that call on exit, and nothing else."""

    def __init__(self, scope: _Scope, new: bool) -> None:
        self._scope = scope
        self._new = new

    def __enter__(self) -> Handle:
        with _lock:
            if self._new:
                _switch.base.discard(self._scope)
            _switch.scopes.append(self._scope)
            _apply()
        return self

    def __exit__(self, *exc: object) -> None:
        with _lock:
            if self._scope in _switch.scopes:
                _switch.scopes.remove(self._scope)
                _apply()


def enable(model: nn.Module | None = None, *, cuda_graphs: bool = False) -> Handle:
    """Serve MobileNetV4 modules with the fused kernels: all of them, built before or later, or those of one model.

    `enable()` is one switch that stays on until `disable()`; again it does nothing. `with enable(): ...` undoes itself.
    `enable(model)` is for the modules that the model has now; copies of it follow the switch for all.

    `cuda_graphs`: the `forward` and `forward_features` of a whole model whose every part has a kernel are captured into
    a CUDA graph by the first call with each input shape, dtype, device and layout, and replayed by the later ones;
    `mnv4_ops.graphs` says when not. The output is the caller's own. Without a GPU it makes no difference. It stays on
    until `disable()`; a further `enable()` does not turn it off.
    TypeError if model is not an nn.Module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"mnv4_ops.enable: expected model to be an nn.Module or None, got {type(model).__name__}")
    with _lock:
        scope = _Scope(model, cuda_graphs)
        if model is None:
            new = not any(s.everything and s.graphs >= cuda_graphs for s in _switch.base)
        else:
            new = True
        if new:
            _switch.base.add(scope)
            _apply()
        return Handle(scope, new)


def disable() -> None:
    """Undo every `enable`, also those of `with` blocks that are still open."""
    with _lock:
        _switch.base.clear()
        _switch.scopes.clear()
        _apply()


def repack(model: nn.Module | None = None) -> None:
    """Make the packed weights of a model (or of all) anew on its next call.

    Needed only after changes that torch does not count: inference tensors, writes through `.data` or raw memory. On a
    GPU they are made anew at once, in the memory that they have, so that CUDA graphs that you captured see the change;
    the graphs of `enable(cuda_graphs=True)` are dropped.
    """
    modules = None if model is None else list(model.modules())
    graphs.drop(modules)
    cache.drop(None if modules is None else iter(modules))


def explain(model: nn.Module, x: Any) -> serve.Report:
    """Run `model(x)` once and say, block by block, what served it or why it ran its original forward. Printable."""
    with serve.observe() as report:
        model(x)
    if _native.core is None:
        return report.finish(model, f"the native library is not loaded: {_native.reason}")
    return report.finish(model, "not reached" if _switch.on else "mnv4_ops is not enabled")


_installed: dict[Target, tuple[type, Any, Any]] = {}


def _apply() -> None:
    """Brings the classes in line with the switch."""
    before = _switch.everything, frozenset(_switch.ids)
    _switch.recompute()
    wanted = _switch.on and _native.core is not None
    if wanted:
        for target in TARGETS:
            if target.module in sys.modules:
                _install(target)
            if target not in _installed:
                imports.watch(target.module, _imported)
    else:
        _uninstall()
        for target in TARGETS:
            imports.ignore(target.module, _imported)
    if before != (_switch.everything, frozenset(_switch.ids)):
        # what was trained meanwhile was not seen
        cache.trained()
        _forget_compiled()


def _install(target: Target) -> None:
    if target in _installed:
        return
    cls = getattr(sys.modules[target.module], target.cls, None)
    original = None if cls is None else cls.__dict__.get(target.method)
    if cls is None or not isinstance(original, types.FunctionType):
        return
    wrapper = _wrap(target, cls, original)
    _installed[target] = cls, original, wrapper
    setattr(cls, target.method, wrapper)


def _uninstall() -> None:
    for target, (cls, original, wrapper) in list(_installed.items()):
        # somebody may have wrapped our wrapper, which then passes every call on
        if cls.__dict__.get(target.method) is wrapper:
            setattr(cls, target.method, original)
            del _installed[target]


def _wrap(target: Target, cls: type, original: Any) -> Any:
    _mnv4_switch, _mnv4_original = _switch, original
    _mnv4_compiling = torch.compiler.is_compiling
    _mnv4_serve: Any = serve.block(target, cls, original) if target.block else serve.model(target, cls, original)
    _mnv4_trace: Any = serve.compiled(target, cls, original, _mnv4_serve)
    forward: Any

    if target.method == "forward_head":

        def with_flag(self: Any, x: Any, pre_logits: bool = False) -> Any:
            if not (_mnv4_switch.everything or id(self) in _mnv4_switch.ids):
                return _mnv4_original(self, x, pre_logits)
            if _mnv4_compiling():
                return _mnv4_trace(self, x, pre_logits)
            return _mnv4_serve(self, x, pre_logits)

        forward = with_flag
    elif target.extra is not None:
        _mnv4_refuse: Any = serve.extra(target, original)

        def with_mask(self: Any, x: Any, attn_mask: Any = None) -> Any:
            if not (_mnv4_switch.everything or id(self) in _mnv4_switch.ids):
                return _mnv4_original(self, x, attn_mask)
            if attn_mask is not None:
                return _mnv4_original(self, x, attn_mask) if _mnv4_compiling() else _mnv4_refuse(self, x, attn_mask)
            if _mnv4_compiling():
                return _mnv4_trace(self, x)
            return _mnv4_serve(self, x)

        forward = with_mask
    elif serve.laned(target):
        _mnv4_lanes = cache.lanes

        def laned(self: Any, x: Any) -> Any:
            if not (_mnv4_switch.everything or id(self) in _mnv4_switch.ids):
                return _mnv4_original(self, x)
            if _mnv4_compiling():
                return _mnv4_trace(self, x)
            lane = _mnv4_lanes.get(id(self))
            if lane is not None:
                out = lane(self, x)
                if out is not None:
                    return out
            return _mnv4_serve(self, x)

        forward = laned
    else:

        def plain(self: Any, x: Any) -> Any:
            if not (_mnv4_switch.everything or id(self) in _mnv4_switch.ids):
                return _mnv4_original(self, x)
            if _mnv4_compiling():
                return _mnv4_trace(self, x)
            return _mnv4_serve(self, x)

        forward = plain

    # torch.jit.script compiles the source of the original (through __wrapped__) with the globals of the wrapper
    # a code object of its own: torch.compile keeps what it compiled, and counts it, by that
    code = forward.__code__.replace(co_name=original.__name__)
    traced.wrappers.append(code)
    wrapper = types.FunctionType(
        code, original.__globals__, original.__name__, forward.__defaults__, forward.__closure__
    )
    wrapper.__dict__.update(original.__dict__)
    wrapper.__wrapped__ = original  # type: ignore[attr-defined]
    for name in ("__doc__", "__module__", "__qualname__", "__annotations__", "__kwdefaults__"):
        setattr(wrapper, name, getattr(original, name))
    return wrapper


def _imported(module: types.ModuleType) -> None:
    with _lock:
        if _switch.on and _native.core is not None:
            for target in TARGETS:
                if target.module == module.__name__:
                    _install(target)


def _forget_compiled() -> None:
    """Compiled code does not see a patched class."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return
    codes = getattr(frames, "output_codes", None)
    if codes is not None and not getattr(codes, "seen", True):
        return
    warnings.warn(
        "mnv4_ops: code was compiled by torch before this change; torch.compiler.reset() is called, "
        "it will be compiled again on its next call",
        RuntimeWarning,
        stacklevel=4,
    )
    torch.compiler.reset()
