"""Packed weights beside the modules: made on the first call, checked on every call, gone with the module.

Nothing is ever written to a module. Each module that was served has a `_Side`: its packed blocks and its plans. A plan
is what a call of one of its methods runs, with the guard that says whether the plan still stands. Packed weights are
the same in every tier, so a change of tier needs no repacking.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnv4_ops import _native
from mnv4_ops.adapters.record import Call, Part, Recipe, Recorder, Unsupported
from mnv4_ops.ops import conditions, cuda
from mnv4_ops.ops.backends import BY_DEVICE
from mnv4_ops.ops.layout import LAYOUTS, Layout, Params, name_of

# for callers of the raw ops, whose modules are not known
RAW_ENTRIES = 512
RAW_BYTES = 512 * 2**20
_lock = threading.RLock()
_epoch = 0


def trained() -> None:
    """Running statistics may have moved without a new version of theirs."""
    global _epoch
    _epoch += 1


def epoch() -> int:
    """Moves with each call of `trained`."""
    return _epoch


def generation() -> int:
    """Moves when the packed weights of raw ops were dropped."""
    return _raw.generation


@dataclass(eq=False)
class Packed:
    """One native block with what it was packed from."""

    layout: Layout
    native: Any
    backend: Any
    key: Any = None
    aliases: list[Tensor] = field(default_factory=list)

    def refresh(self, params: Params, eps: Sequence[float], force: bool = False, raw: bool = False) -> None:
        """Packs again, into the same memory, if a parameter has another address or version.

        `raw`: asked on every call, so that the contents of statistics are not looked at where that is slow.
        """
        assert _native.core is not None
        exact = self.backend.EXACT or not raw
        statistics = self.backend.statistics(self.layout, params) if exact else _epoch
        key = (_native.core.fingerprint(list(params)), statistics, tuple(eps))
        if key == self.key and not force:
            return
        self.key = None
        aliases = [t.detach() for t in params if t is not None]
        if self.backend.pack(self.native, self.layout, params, eps):
            self.key = key
        # they keep the addresses from being given to other tensors
        self.aliases = aliases


@dataclass(eq=False)
class Step:
    """Part of a model plan: a program, or a module that is called. `fallback` are the modules that do the same."""

    program: Any
    module: weakref.ref[nn.Module] | None = None
    fallback: tuple[weakref.ref[nn.Module], ...] = ()
    method: str | None = None  # of the model itself
    emit: bool = False
    ops: tuple[str, ...] = ()  # of the program


@dataclass(eq=False)
class Plan:
    """What a call runs, or the reason why it runs the original forward. Holds while `guard` says so."""

    guard: Any
    describe: Callable[[Recorder], Part | Recipe]
    reason: str | None = None
    hooked: bool = False  # there were hooks when the reason was found
    run: Callable[[Tensor], Tensor] | None = None  # all of it: a block, or a model that is one program
    steps: list[Step] = field(default_factory=list)  # of a model
    recipe: list[Part | Call] = field(default_factory=list)
    program: Any = None  # the only step, if it is one
    c_in: int = 0
    refuses: Callable[[int, int], str | None] | None = None  # of a block that does not take every size
    dtype: torch.dtype | None = None  # of the weights
    device: torch.device | None = None
    index: int = -2  # of the device, as Tensor.get_device() gives it
    lane: Any = None  # of a model that is one program on the CPU; False where there can be none

    def mismatch(self, x: Tensor) -> str | None:
        """Why this input does not go with the weights, or None."""
        if x.dtype is self.dtype and x.get_device() == self.index:
            return None
        if x.device != self.device:
            return f"the input is on {x.device}, the weights are on {self.device}"
        assert self.dtype is not None
        return f"the input is {name_of(x.dtype)}, the weights are {name_of(self.dtype)}"

    def take(self, packed: Packed) -> None:
        """Notes where the weights are. Unsupported if parts differ."""
        layout = packed.layout
        if self.dtype is None:
            assert layout.device is not None
            self.dtype, self.device = layout.dtype, layout.device
            self.index = -1 if layout.device.type == "cpu" else layout.device.index or 0
        elif (layout.dtype, layout.device) != (self.dtype, self.device):
            raise Unsupported(
                f"weights on {self.device} ({self.dtype}) and on {layout.device} ({layout.dtype}) in one model"
            )


class _Side:
    __slots__ = ("__weakref__", "packed", "plans", "ref")

    def __init__(self, module: nn.Module, ref: weakref.ref[nn.Module]) -> None:
        self.ref = ref
        self.packed: dict[str, Packed] = {}
        self.plans: dict[str, Plan] = {}


_sides: dict[int, _Side] = {}
# the short ways of whole models by the id of the module: (module, input) -> output, or None for the long way
lanes: dict[int, Callable[[Any, Any], Tensor | None]] = {}


def _side(module: nn.Module) -> _Side:
    key = id(module)
    side = _sides.get(key)
    if side is None or side.ref() is not module:

        def gone(ref: weakref.ref[nn.Module], key: int = key) -> None:
            held = _sides.get(key)
            if held is not None and held.ref is ref:
                del _sides[key]
                lanes.pop(key, None)

        side = _sides[key] = _Side(module, weakref.ref(module, gone))
        lanes.pop(key, None)
    return side


def learn(module: nn.Module, plan: Plan, x: Tensor, out: Tensor) -> None:
    """Lets later calls of a whole model take its lane, for inputs like this one, which has just gone the long way."""
    core = _native.core
    assert core is not None
    if plan.lane is None:
        native = getattr(plan.program, "native", None)  # of the CPU backend's programs
        good = isinstance(native, core.Program) and plan.index == -1 and core.lanes_found()
        plan.lane = good and core.Lane(_side(module).ref, plan.guard, native, conditions.HOOKS)
    if plan.lane and plan.lane.learn(x, tuple(out.shape)) and id(module) not in lanes:
        with _lock:
            if find(module, "forward") is plan:
                lanes[id(module)] = plan.lane.call


def find(module: nn.Module, name: str) -> Plan | None:
    """The plan of a method, unchecked."""
    side = _sides.get(id(module))
    return side.plans.get(name) if side is not None and side.ref() is module else None


def layout_of(part: Part) -> Layout:
    """ValueError says what is wrong with the arguments of its op."""
    return LAYOUTS[part.op](part.params, part.eps, *part.args, *([part.spec.channels[0]] * (part.op == "head")))


def _pack_part(rec: Recorder, plan: Plan, part: Part, force: bool) -> Packed:
    try:
        layout = layout_of(part)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    assert layout.device is not None
    backend = BY_DEVICE.get(layout.device.type)
    if backend is None:
        raise Unsupported(f"parameters on {layout.device}: no kernels for this device")
    if (reason := backend.unavailable()) is not None:
        raise Unsupported(f"parameters on {layout.device}: {reason}")
    side = _side(rec.modules[part.node])
    packed = side.packed.get(part.slot)
    if packed is None or packed.layout != layout or packed.backend is not backend:
        try:
            packed = Packed(layout, backend.build(layout), backend)
        except ValueError as error:
            raise Unsupported(str(error)) from None
    packed.refresh(part.params, part.eps, force)
    side.packed[part.slot] = packed
    plan.take(packed)
    return packed


def _ref(rec: Recorder, node: int) -> weakref.ref[nn.Module]:
    return weakref.ref(rec.modules[node])


def _steps(rec: Recorder, plan: Plan, recipe: Recipe, force: bool) -> Iterator[Step]:
    """Consecutive parts become one program; features are taken between programs."""
    pending: list[Packed] = []
    covered: list[weakref.ref[nn.Module]] = []
    method: str | None = None

    def flush(emit: bool = False) -> Iterator[Step]:
        nonlocal method
        if pending:
            try:
                program = pending[0].backend.program([(p.native, p.layout) for p in pending])
            except ValueError as error:  # parts that do not follow on each other
                raise Unsupported(str(error)) from None
            yield Step(program, None, tuple(covered), method, emit, tuple(p.layout.op for p in pending))
            pending.clear()
            covered.clear()
            method = None

    for index, step in enumerate(recipe.steps):
        emit = index in recipe.emit
        if isinstance(step, Part):
            pending.append(_pack_part(rec, plan, step, force))
            if step.op == "head":
                method = "forward_head"
                if step.slot.endswith("+feat"):
                    covered.append(_ref(rec, _feat_node(rec)))
            elif step.node:
                covered.append(_ref(rec, step.node))
            if emit:
                yield from flush(True)
        else:
            yield from flush()
            if step.node:
                yield Step(None, _ref(rec, step.node), emit=emit)
            else:
                yield Step(None, method=step.name)
    yield from flush()


def _feat_node(rec: Recorder) -> int:
    # the last block, whose 1x1 the head has taken over
    stage = list(rec.children(rec.child(0, "blocks")))[-1][1]
    return list(rec.children(stage))[-1][1]


def renew(module: nn.Module, name: str, describe: Callable[[Recorder], Part | Recipe], force: bool = False) -> Plan:
    """Describes and packs a module anew, unless another thread has just done so."""
    with _lock:
        plan = find(module, name)
        if plan is not None and not force and plan.guard.check(module, False) not in (1, 2):
            return plan
        rec = Recorder(module)
        reason = None
        try:
            found = describe(rec)
        except Unsupported as error:
            reason = str(error)
        # before packing: a change from here on is seen by the next check
        guard = rec.guard()
        plan = Plan(guard, describe, reason)
        if reason is None:
            try:
                _fill(plan, rec, found, force)
            except Unsupported as error:
                plan.reason = str(error)
        _side(module).plans[name] = plan
        if name == "forward":
            lanes.pop(id(module), None)
        return plan


def _fill(plan: Plan, rec: Recorder, found: Part | Recipe, force: bool) -> None:
    if isinstance(found, Part):
        packed = _pack_part(rec, plan, found, force)
        plan.run = packed.backend.runner(packed.native, packed.layout)
        plan.c_in = packed.layout.c_in
        plan.refuses = packed.layout.refuses if packed.layout.query_stride > 1 else None
        plan.recipe = [_noted(found, plan)]
        return
    plan.steps = list(_steps(rec, plan, found, force))
    plan.recipe = [_noted(step, plan) if isinstance(step, Part) else step for step in found.steps]
    if len(plan.steps) == 1 and not plan.steps[0].emit:
        plan.program = plan.steps[0].program
        plan.run = None if plan.program is None else plan.program.run
    first = found.steps[0]
    plan.c_in = first.spec.channels[0] if isinstance(first, Part) else 0


def _noted(part: Part, plan: Plan) -> Part:
    """For reports: without its tensors, with the dtype."""
    assert plan.dtype is not None
    spec = part.spec.with_dtype(name_of(plan.dtype))
    return Part(part.node, part.slot, part.name, spec, part.op, (), (), part.args)


def drop(modules: Iterator[nn.Module] | None = None) -> None:
    """Makes the weights of some modules, or of all, anew in the memory that they have; raw ops start anew.

    On the CPU on the next call; on a GPU at once, since a captured CUDA graph makes no call.
    """
    with _lock:
        _raw.clear()
        sides = list(_sides.values())
        if modules is not None:
            wanted = {id(module) for module in modules}
            sides = [side for side in sides if id(side.ref()) in wanted]
        at_once: list[tuple[nn.Module, str, Plan]] = []
        for side in sides:
            module = side.ref()
            for name, plan in side.plans.items():
                if module is not None and plan.device is not None and BY_DEVICE[plan.device.type] is cuda:
                    at_once.append((module, name, plan))
            side.plans.clear()
            lanes.pop(id(module), None)
            for packed in side.packed.values():
                packed.key = None
        for module, name, plan in at_once:
            renew(module, name, plan.describe)


class _Raw:
    """Packed weights for callers of the raw ops, keyed by the addresses of the parameters; the oldest go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, tuple[Packed, Any]] = OrderedDict()
        self._bytes = 0
        self.generation = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self.generation += 1
        self._entries.clear()
        self._bytes = 0

    def _pop(self, key: Any) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[0].native.packed_bytes

    def get(self, layout: Layout, params: Params, eps: Sequence[float], backend: Any) -> Any:
        if _native.core is None:
            return backend.build(layout)  # says why not
        addresses, _ = _native.core.fingerprint(list(params))
        key = (layout, tuple(eps), addresses)
        with _lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                entry[0].refresh(params, eps, raw=True)
                return entry[0].native
            packed = Packed(layout, backend.build(layout), backend)
            packed.refresh(params, eps, raw=True)
            first = next((t for t in params if t is not None), None)
            self._entries[key] = packed, first if first is None else weakref.ref(first, lambda _: self._drop(key))
            self._bytes += packed.native.packed_bytes
            while len(self._entries) > 1 and (len(self._entries) > RAW_ENTRIES or self._bytes > RAW_BYTES):
                self._pop(next(iter(self._entries)))
            return packed.native

    def _drop(self, key: Any) -> None:
        with _lock:
            self._pop(key)


_raw = _Raw()


def packed_for_tensors(layout: Layout, params: Params, eps: Sequence[float], backend: Any) -> Any:
    """The native block for parameters that were passed to a raw op."""
    return _raw.get(layout, params, eps, backend)


def stats() -> dict[str, int]:
    """Counts and bytes of what is cached: modules, packed blocks, bytes of packed weights, raw entries."""
    with _lock:
        natives = [p.native for side in _sides.values() for p in side.packed.values()]
        return {
            "modules": len(_sides),
            "blocks": len(natives),
            "bytes": sum(n.packed_bytes for n in natives),
            "raw_entries": len(_raw),
            "raw_bytes": _raw._bytes,
        }
