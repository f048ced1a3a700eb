"""What the wrappers do under torch.compile: ops in place of blocks, in the graph, or the original forward.

A model becomes one `mnv4::module`: the wrapper's own work, with its check before each call, so that no parameter is an
input of the graph. Where other code of the same graph reads, writes or exchanges its parameters, and for single blocks
inside of other code, there are ops that take them.
"""

from __future__ import annotations

import functools
import itertools
import types
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv4_ops import cache
from mnv4_ops.adapters import Target
from mnv4_ops.adapters.record import Names, Part, Recipe, Recorder, Unsupported, follow, grouped
from mnv4_ops.ops import cpu, cuda, flops
from mnv4_ops.ops.backends import BY_DEVICE
from mnv4_ops.ops.layout import DTYPES, Layout, empty_output
from mnv4_ops.ops.program import recipe_of

# constants that a compiler guards by value when they are read
_CONSTANTS = (bool, int, float, str, type(None))


class _Group(NamedTuple):
    """Parts in a row, as one call of `mnv4::program` or of the only part's own op."""

    op: str
    paths: tuple[Names | None, ...]  # of the params
    eps: tuple[float, ...]
    args: tuple[Any, ...]


class _Outline(NamedTuple):
    """Everything about a module but its tensors."""

    # a group, the path of a module, or the name of a method of the module itself; and whether the output is a feature
    steps: tuple[tuple[_Group | Names | str, bool], ...]
    evaluating: tuple[Names, ...]  # modules that have to be in eval mode
    classes: tuple[tuple[Names, type], ...]  # of the modules that are described
    lengths: tuple[tuple[Names, int], ...]  # of those that are sequences
    constants: tuple[tuple[Names, str, Any], ...]
    c_in: int
    dtype: torch.dtype
    device: torch.device
    handle: str  # of `mnv4::module`; empty if it may not be used here
    owner: int  # id of the module


class _Served(NamedTuple):
    """What `mnv4::module` calls."""

    ref: weakref.ref[nn.Module]
    run: Callable[..., Any]  # the wrapper's work
    flags: tuple[Any, ...]
    layouts: tuple[Layout, ...]


# a compiled module has a guard on its identity, and torch compiles one function a few times only
HANDLES = 4
_served: dict[str, _Served] = {}
# the code of every wrapper, for `_apart`
wrappers: list[types.CodeType] = []


def _handle(module: nn.Module, run: Callable[..., Any], flags: tuple[Any, ...], layouts: tuple[Layout, ...]) -> str:
    """The key of a module in `_served`; no other process has the same. Empty if there are too many of its class."""
    for key, served in _served.items():
        if served.ref() is module and served[1:] == (run, flags, layouts):
            return key
    if sum(type(served.ref()) is type(module) for served in _served.values()) >= HANDLES:
        return ""
    key = uuid.uuid4().hex
    _served[key] = _Served(weakref.ref(module, lambda _: _served.pop(key, None)), run, flags, layouts)
    return key


def _entry(key: str) -> tuple[_Served, nn.Module]:
    served = _served.get(key)
    module = None if served is None else served.ref()
    if served is None or module is None:
        raise RuntimeError(f"mnv4::module: expected module to be alive in this process, got {key!r}")
    return served, module


def _module(x: Tensor, module: str) -> Tensor:
    served, owner = _entry(module)
    out: Tensor = served.run(owner, x, *served.flags)
    # an original forward may have left it in another layout than the compiled code was told
    return out.contiguous(memory_format=torch.channels_last) if out.dim() == 4 else out


def _module_flops(x: Tensor, module: str, out_val: Any = None) -> int:
    return flops.count(_entry(module)[0].layouts, x.shape[0], *x.shape[2:])


def _module_fake(x: Tensor, module: str) -> Tensor:
    for layout in _entry(module)[0].layouts:
        x = empty_output(layout, x)
    return x


_library = torch.library.Library("mnv4", "FRAGMENT")
_library.define("module(Tensor x, str module) -> Tensor", tags=(torch.Tag.flexible_layout,))
_library.impl("module", _module, "CPU")
torch.library.register_fake("mnv4::module", _module_fake, lib=_library)
flops.register({"module": _module_flops})


# modules whose tensors other code of a compiled graph was seen to use
_touched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _apart(module: nn.Module, whole: bool) -> bool:
    """Whether no other code in the graph that is being traced has to do with the tensors of this module.

    What comes after the call is not known yet: `_watch` looks again at the end. `whole`: it is a whole model, which is
    worth that.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew

        output = InstructionTranslator.current_tx().output
        root = output.root_tx
        if root.f_locals.get("self") is module and any(root.f_code is code for code in wrappers):
            return True
        if not whole or torch.is_grad_enabled() or module in _touched:
            return False
        effects, new = output.side_effects, (AttributeMutationNew, ValueMutationNew)
        # code before the call may have given parameters to the module, which only the compiler knows of
        for variable in effects.id_to_variable.values():
            if not isinstance(variable.mutation_type, new) and effects.is_modified(variable):
                return False
        _watch(module, output)
        return True
    except (ImportError, AttributeError):  # not public
        return False


def _watch(module: nn.Module, output: Any) -> None:
    """Has the graph looked at when it is complete; if a tensor of the module is in it, it is traced once more."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    ref = weakref.ref(module)

    def look(graph: torch.fx.GraphModule) -> None:
        owner = ref()
        keys = {key for key, served in _served.items() if served.ref() is owner}
        # calls may be in graphs of their own (torch.cond), inputs are always here
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        calls = (node for part in parts for node in part.graph.nodes if node.target is torch.ops.mnv4.module)
        if owner is None or not any(keys.intersection(node.args) for node in calls):
            return
        held = {_storage(t) for t in itertools.chain(owner.parameters(), owner.buffers())}
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                t = getattr(node.meta.get("grapharg"), "example", None)
            elif node.op == "get_attr":
                t = functools.reduce(getattr, node.target.split("."), graph)
            else:
                continue
            if isinstance(t, Tensor) and _storage(t) in held:
                _touched.add(owner)
                raise UnspecializeRestartAnalysis(restart_reason="the graph uses a parameter of a fused module")

    output.add_graph_finalizer(look)


def _storage(t: Tensor) -> int:
    """The identity of what views have in common; 0 for those without."""
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def _group(rec: Recorder, parts: list[Part]) -> _Group:
    if len(parts) == 1:
        part = parts[0]
        return _Group(part.op, rec.tensor_paths(part.params), tuple(part.eps), part.args)
    text = recipe_of([(part.op, part.params, part.args) for part in parts])
    paths = rec.tensor_paths([t for part in parts for t in part.params if t is not None])
    return _Group("program", paths, tuple(e for part in parts for e in part.eps), (text,))


def _outline(
    module: nn.Module,
    describe: Callable[[Recorder], Part | Recipe],
    run: Callable[..., Any] | None,
    flags: tuple[Any, ...],
    whole: bool,
) -> _Outline | None:
    rec = Recorder(module)
    try:
        found = describe(rec)
        recipe = Recipe([found]) if isinstance(found, Part) else found
        parts = [step for step in recipe.steps if isinstance(step, Part)]
        layouts = [cache.layout_of(part) for part in parts]
        if any(layout.query_stride > 1 for layout in layouts):
            return None  # whether it is served depends on the size
        kinds = {(layout.dtype, layout.device) for layout in layouts}
        if len(kinds) != 1:
            return None
        dtype, device = kinds.pop()
        backend = None if device is None else BY_DEVICE.get(device.type)
        if dtype is None or device is None or backend is None:
            return None
        if backend.unavailable() is not None or dtype not in DTYPES[device.type]:
            return None
        code = rec.guard().check(module, torch.is_grad_enabled())
        if code in (4, 5):
            return None
        steps, handle = grouped(rec, recipe, functools.partial(_group, rec)), ""
        if run is not None and backend is cpu and len(steps) == 1 and not steps[0][1]:
            handle = _handle(module, run, flags, tuple(layouts)) if _apart(module, whole) else ""
        for part, layout in zip(parts, layouts, strict=True):
            # an op raises where a block runs its original forward
            if code == 0 and backend is cuda:
                # packed now and not by the first call, whose memory may come from the pool of a graph and has to go
                cache.packed_for_tensors(layout, list(part.params), list(part.eps), backend)
            else:
                backend.build(layout)
    except (Unsupported, ValueError):
        return None
    classes = rec.classes()
    lengths = tuple((path, len(follow(module, path)._modules)) for path, cls in classes if cls is nn.Sequential)
    return _Outline(
        steps, rec.eval_paths(), classes, lengths, rec.constants(_CONSTANTS), layouts[0].c_in, dtype, device, handle,
        id(module),
    )  # fmt: skip


def forward(
    target: Target,
    original: Callable[..., Any],
    describers: Sequence[Callable[[Recorder], Part | Recipe]],
    serve: Callable[..., Any],
) -> Callable[..., Any]:
    """The traced forward of a target; `describers` as in `Target.plans`, `serve` is the wrapper's work otherwise."""
    pyramid = "feature_pyramid" in target.plans

    @torch.compiler.assume_constant_result
    def outline(self: nn.Module, flags: tuple[Any, ...]) -> _Outline | None:
        return _outline(
            self, describers[1 if flags and flags[0] else 0], None if pyramid else serve, flags, not target.block
        )

    def run(self: Any, x: Any, *flags: Any) -> Any:
        if torch.compiler.is_exporting():
            return original(self, x, *flags)
        found = outline(self, flags)
        if found is None or x.dim() != 4 or x.shape[1] != found.c_in:
            return original(self, x, *flags)
        if x.dtype != found.dtype or x.device != found.device or torch.is_autocast_enabled(found.device.type):
            return original(self, x, *flags)
        grad = torch.is_grad_enabled()
        if found.handle and not grad and not self.training and id(self) == found.owner:
            return torch.ops.mnv4.module(x, found.handle)
        # what is read is guarded: a change compiles again
        for path in found.evaluating:
            if follow(self, path).training:
                return original(self, x, *flags)
        for path, cls in found.classes:
            module = follow(self, path)
            # reading `forward` guards that the instance gets none of its own
            if type(module) is not cls or module.forward is None:
                return original(self, x, *flags)
        for path, length in found.lengths:
            if len(follow(self, path)._modules) != length:
                return original(self, x, *flags)
        for path, name, value in found.constants:
            if getattr(follow(self, path), name) != value:
                return original(self, x, *flags)
        if grad and x.requires_grad:
            return original(self, x, *flags)
        tensors = []
        for step, _ in found.steps:
            if isinstance(step, _Group):
                params = [None if path is None else follow(self, path) for path in step.paths]
                if grad:
                    for p in params:
                        if p is not None and p.requires_grad:
                            return original(self, x, *flags)
                tensors.append(params)
        features = []
        at = 0
        for step, emit in found.steps:
            if isinstance(step, _Group):
                x = getattr(torch.ops.mnv4, step.op)(x, tensors[at], list(step.eps), *step.args)
                at += 1
            elif isinstance(step, str):
                x = getattr(self, step)(x)
            else:
                x = follow(self, step)(x)
            if emit:
                features.append(x)
        return features if pyramid else x

    return run
