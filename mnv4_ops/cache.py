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
from mnv4_ops.ops import cpu
from mnv4_ops.ops.layout import LAYOUTS, Layout, Params

# for callers of the raw ops, whose modules are not known
RAW_ENTRIES = 512
RAW_BYTES = 512 * 2**20
# a larger workspace is allocated for the call
WORKSPACE_KEPT = 8 * 2**20

_CPU = torch.device("cpu")
_lock = threading.RLock()
_local = threading.local()


@dataclass(eq=False)
class Packed:
    """One native block with what it was packed from."""

    layout: Layout
    native: Any
    key: Any = None
    aliases: list[Tensor] = field(default_factory=list)

    def refresh(self, params: Params, eps: Sequence[float], force: bool = False) -> None:
        """Packs again, into the same memory, if a parameter has another address or version."""
        assert _native.core is not None
        key = (_native.core.fingerprint(list(params)), _statistics(self.layout, params), tuple(eps))
        if key == self.key and not force:
            return
        self.key = None
        aliases = [t.detach() for t in params if t is not None]
        cpu.pack(self.native, self.layout, params, eps)
        # the aliases keep the addresses from being given to other tensors
        self.key, self.aliases = key, aliases


def _statistics(layout: Layout, params: Params) -> int:
    """Hash of all running statistics: a train-mode forward moves them without a new version."""
    assert _native.core is not None
    found = [params[base + i] for _, base in layout.stages for i in (4, 5)]
    arrays = [t.detach().contiguous() for t in found if t is not None]
    return _native.core.checksum([(t.data_ptr(), t.numel()) for t in arrays])


class _Program:
    """A native program with the shapes it has met."""

    def __init__(self, parts: list[Packed]) -> None:
        assert _native.core is not None
        self.native = _native.core.Program([p.native for p in parts])
        self.c_in = parts[0].layout.c_in
        self._shapes: dict[tuple[int, int, int], tuple[tuple[int, ...], int]] = {}

    def run(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        known = self._shapes.get((n, h, w))
        if known is None:
            known = self._meet(n, h, w)
        shape, size = known
        if len(shape) == 4:
            out = torch.empty(shape, dtype=torch.float32, device=_CPU, memory_format=torch.channels_last)
        else:
            out = torch.empty(shape, dtype=torch.float32, device=_CPU)
        if n:
            memory = workspace(size)
            threads = torch.get_num_threads()
            self.native.run(x.data_ptr(), n, h, w, x.stride(), out.data_ptr(), memory.data_ptr(), threads)
        return out

    def _meet(self, n: int, h: int, w: int) -> tuple[tuple[int, ...], int]:
        if len(self._shapes) >= 64:
            self._shapes.clear()
        native = self.native
        known = (native.output_shape(n, h, w), native.workspace_bytes(n, h, w, torch.get_num_threads()))
        self._shapes[n, h, w] = known
        return known


def workspace(size: int) -> Tensor:
    """Memory of the calling thread for the activations between blocks; grows, up to a limit."""
    if size > WORKSPACE_KEPT:
        return torch.empty(size, dtype=torch.uint8, device=_CPU)
    kept = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = _local.workspace = torch.empty(max(size, 1 << 16), dtype=torch.uint8, device=_CPU)
    return kept


@dataclass(eq=False)
class Step:
    """Part of a model plan: a program, or a module that is called. `fallback` are the modules that do the same."""

    program: _Program | None
    module: weakref.ref[nn.Module] | None = None
    fallback: tuple[weakref.ref[nn.Module], ...] = ()
    method: str | None = None  # of the model itself
    emit: bool = False


@dataclass(eq=False)
class Plan:
    """What a call runs, or the reason why it runs the original forward. Holds while `guard` says so."""

    guard: Any
    reason: str | None = None
    packed: Packed | None = None  # of a block
    steps: list[Step] = field(default_factory=list)  # of a model
    recipe: list[Part | Call] = field(default_factory=list)
    program: _Program | None = None  # the only step, if it is one
    c_in: int = 0


class _Side:
    __slots__ = ("__weakref__", "packed", "plans", "ref")

    def __init__(self, module: nn.Module, ref: weakref.ref[nn.Module]) -> None:
        self.ref = ref
        self.packed: dict[str, Packed] = {}
        self.plans: dict[str, Plan] = {}


_sides: dict[int, _Side] = {}


def _side(module: nn.Module) -> _Side:
    key = id(module)
    side = _sides.get(key)
    if side is None or side.ref() is not module:

        def gone(ref: weakref.ref[nn.Module], key: int = key) -> None:
            held = _sides.get(key)
            if held is not None and held.ref is ref:
                del _sides[key]

        side = _sides[key] = _Side(module, weakref.ref(module, gone))
    return side


def find(module: nn.Module, name: str) -> Plan | None:
    """The plan of a method, unchecked."""
    side = _sides.get(id(module))
    return side.plans.get(name) if side is not None and side.ref() is module else None


def _pack_part(rec: Recorder, part: Part, force: bool) -> Packed:
    try:
        layout = LAYOUTS[part.op](part.params, part.eps, *part.args, *([part.spec.channels[0]] * (part.op == "head")))
    except ValueError as error:
        raise Unsupported(str(error)) from None
    first = next((t for t in part.params if t is not None), None)
    if first is not None and first.device.type != cpu.DEVICE:
        raise Unsupported(f"parameters on {first.device}: no kernels for this device")
    side = _side(rec.modules[part.node])
    packed = side.packed.get(part.slot)
    if packed is None or packed.layout != layout:
        try:
            packed = Packed(layout, cpu.build(layout))
        except ValueError as error:
            raise Unsupported(str(error)) from None
    packed.refresh(part.params, part.eps, force)
    side.packed[part.slot] = packed
    return packed


def _ref(rec: Recorder, node: int) -> weakref.ref[nn.Module]:
    return weakref.ref(rec.modules[node])


def _steps(rec: Recorder, recipe: Recipe, force: bool) -> Iterator[Step]:
    """Consecutive parts become one program; features are taken between programs."""
    pending: list[Packed] = []
    covered: list[weakref.ref[nn.Module]] = []
    method: str | None = None

    def flush(emit: bool = False) -> Iterator[Step]:
        nonlocal method
        if pending:
            yield Step(_Program(pending), None, tuple(covered), method, emit)
            pending.clear()
            covered.clear()
            method = None

    for index, step in enumerate(recipe.steps):
        emit = index in recipe.emit
        if isinstance(step, Part):
            pending.append(_pack_part(rec, step, force))
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
        plan = Plan(guard, reason)
        if reason is None:
            try:
                _fill(plan, rec, found, force)
            except Unsupported as error:
                plan.reason = str(error)
        _side(module).plans[name] = plan
        return plan


def _fill(plan: Plan, rec: Recorder, found: Part | Recipe, force: bool) -> None:
    if isinstance(found, Part):
        plan.packed = _pack_part(rec, found, force)
        plan.recipe = [_without_tensors(found)]
        plan.c_in = plan.packed.layout.c_in
        return
    plan.steps = list(_steps(rec, found, force))
    plan.recipe = [_without_tensors(step) if isinstance(step, Part) else step for step in found.steps]
    if len(plan.steps) == 1 and not plan.steps[0].emit:
        plan.program = plan.steps[0].program
    first = found.steps[0]
    plan.c_in = first.spec.channels[0] if isinstance(first, Part) else 0


def _without_tensors(part: Part) -> Part:
    return Part(part.node, part.slot, part.name, part.spec, part.op, (), (), part.args)


def drop(modules: Iterator[nn.Module] | None = None) -> None:
    """Makes the next call of some modules, or of all, pack again, into the same memory; raw ops start anew."""
    with _lock:
        _raw.clear()
        sides = list(_sides.values())
        if modules is not None:
            wanted = {id(module) for module in modules}
            sides = [side for side in sides if id(side.ref()) in wanted]
        for side in sides:
            side.plans.clear()
            for packed in side.packed.values():
                packed.key = None


class _Raw:
    """Packed weights for callers of the raw ops, keyed by the addresses of the parameters; the oldest go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Any, tuple[Packed, Any]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
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
                entry[0].refresh(params, eps)
                return entry[0].native
            packed = Packed(layout, backend.build(layout))
            packed.refresh(params, eps)
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
