"""What an adapter reads from a module while it describes it, and what it gives back.

Everything goes through a `Recorder`, so that the guard checks exactly what the description rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mnv4_ops import _native
from mnv4_ops.spec import Spec

Names = tuple[str, ...]  # of a module or tensor: attribute names from the root
Group = TypeVar("Group")

_PLAIN = (Tensor, nn.Parameter)


class Unsupported(Exception):
    """Why a module runs its original forward, in words."""


@dataclass(frozen=True, eq=False)
class Part:
    """One fused op of a module: its spec, and the arguments of `torch.ops.mnv4.<op>(x, params, eps, *args)`."""

    node: int  # of the module that owns the packed weights
    slot: str  # which of its packed weights
    name: str  # path below the described module
    spec: Spec
    op: str
    params: Sequence[Tensor | None]
    eps: Sequence[float]
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A module that runs its own forward between fused parts, and why."""

    node: int
    name: str
    reason: str


@dataclass(eq=False)
class Recipe:
    """A whole model: what runs in order. `emit` holds the indices of steps whose outputs are returned as features."""

    steps: list[Part | Call] = field(default_factory=list)
    emit: list[int] = field(default_factory=list)


class Recorder:
    """Walks a module by attribute names. Nodes are indices; 0 is the module that is described."""

    def __init__(self, root: nn.Module) -> None:
        self.modules: list[nn.Module] = [root]
        self._entries: list[tuple[int, str, nn.Module, bool]] = [(-1, "", root, True)]
        self._index: dict[tuple[int, str], int] = {}
        self._attributes: dict[tuple[int, str], Any] = {}
        self._tensors: dict[tuple[int, str], tuple[bool, Tensor | None]] = {}

    def mark(self) -> tuple[int, int, int]:
        return len(self.modules), len(self._attributes), len(self._tensors)

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Forgets what was read since `mark`."""
        modules, attributes, tensors = mark
        del self.modules[modules:], self._entries[modules:]
        self._index = {key: i for key, i in self._index.items() if i < modules}
        for kept, length in ((self._attributes, attributes), (self._tensors, tensors)):
            for key in list(kept)[length:]:
                del kept[key]

    def path(self, node: int, name: str = "") -> str:
        parts = [name] if name else []
        while node > 0:
            parent, own, _, _ = self._entries[node]
            parts.append(own)
            node = parent
        return ".".join(reversed(parts))

    def child(self, node: int, name: str, *, called: bool = False) -> int:
        """A submodule; `called`: it will run as a module, so that its hooks and own forward are its own matter."""
        key = (node, name)
        if key not in self._index:
            module = self.modules[node]._modules.get(name)
            if module is None:
                raise Unsupported(f"{self.path(node, name)}: expected a module")
            self._index[key] = len(self.modules)
            self.modules.append(module)
            self._entries.append((node, name, module, called))
        return self._index[key]

    def children(self, node: int, *, called: bool = False) -> Iterator[tuple[str, int]]:
        for name in self.modules[node]._modules:
            yield name, self.child(node, name, called=called)

    def has_child(self, node: int, name: str) -> bool:
        if self.modules[node]._modules.get(name) is not None:
            return True
        # a later assignment of a module takes the name out of __dict__, which the guard sees
        self.attribute(node, name, None)
        return False

    def attribute(self, node: int, name: str, *default: Any) -> Any:
        """An attribute kept in the instance."""
        values = self.modules[node].__dict__
        if name not in values:
            if default:
                return default[0]
            raise Unsupported(f"{self.path(node, name)}: expected an attribute")
        self._attributes[node, name] = values[name]
        return values[name]

    def absent(self, node: int, name: str) -> None:
        """The description holds only while the instance has no attribute of this name."""
        if name in self.modules[node].__dict__:
            raise Unsupported(f"{self.path(node, name)} is set on the instance")
        self._attributes[node, name] = ...

    def evaluating(self, node: int) -> None:
        """The description holds only in eval mode of this module."""
        self._attributes[node, "training"] = False

    def tensor(self, node: int, name: str, *, optional: bool = False) -> Tensor | None:
        """A parameter or buffer."""
        module = self.modules[node]
        buffer = name in module._buffers
        if not buffer and name not in module._parameters:
            raise Unsupported(f"{self.path(node, name)}: expected a parameter or buffer")
        t = (module._buffers if buffer else module._parameters)[name]
        self._tensors[node, name] = (buffer, t)
        if t is None:
            if optional:
                return None
            raise Unsupported(f"{self.path(node, name)}: expected a tensor, got None")
        if type(t) not in _PLAIN:
            raise Unsupported(f"{self.path(node, name)} is a {type(t).__name__}, not a plain tensor")
        if t.layout is not torch.strided or t.device.type == "meta":
            raise Unsupported(f"{self.path(node, name)} is not a dense tensor with data ({t.layout}, {t.device})")
        return t

    def tensor_paths(self, params: Sequence[Tensor | None]) -> tuple[tuple[str, ...] | None, ...]:
        """Where the tensors of a part are, as attribute names from the root."""
        where = {id(t): (node, name) for (node, name), (_, t) in self._tensors.items() if t is not None}
        return tuple(None if t is None else tuple(self.path(*where[id(t)]).split(".")) for t in params)

    def eval_paths(self) -> tuple[tuple[str, ...], ...]:
        """Modules whose eval mode the description rests on."""
        paths = [self.path(node) for node, name in self._attributes if name == "training"]
        return tuple(tuple(p.split(".")) if p else () for p in paths)

    def classes(self) -> tuple[tuple[tuple[str, ...], type], ...]:
        """The modules below the root whose inside is described: (path, class)."""
        inside = [node for node, (*_, called) in enumerate(self._entries) if not called]
        return tuple((tuple(self.path(node).split(".")), type(self.modules[node])) for node in inside)

    def constants(self, kinds: tuple[type, ...]) -> tuple[tuple[tuple[str, ...], str, Any], ...]:
        """The plain attributes that the description rests on: (path of the module, name, value)."""
        found = []
        for (node, name), value in self._attributes.items():
            values = value if isinstance(value, tuple) else (value,)
            if name != "training" and all(type(v) in kinds for v in values):
                path = self.path(node)
                found.append((tuple(path.split(".")) if path else (), name, value))
        return tuple(found)

    def identity(self, node: int, name: str, what: str) -> None:
        """Refuses a submodule that does something."""
        child = self.child(node, name)
        kind = type(self.modules[child])
        if kind is not nn.Identity:
            raise Unsupported(f"{self.path(child)}: {what} ({kind.__name__}) has no kernel")

    def guard(self) -> Any:
        """The native check that all of it still stands."""
        assert _native.core is not None
        tensors = [(node, name, buffer, t) for (node, name), (buffer, t) in self._tensors.items()]
        aliases = [t.detach() for *_, t in tensors if t is not None and type(t) in _PLAIN]
        attributes = [(node, name, value) for (node, name), value in self._attributes.items()]
        return _native.core.Guard(self._entries, attributes, tensors, aliases)


def grouped(
    rec: Recorder, recipe: Recipe, group: Callable[[list[Part]], Group]
) -> tuple[tuple[Group | Names | str, bool], ...]:
    """The steps of a recipe, and whether the output of each is a feature.

    Parts in a row are one `group`; anything else is the path of a module, or the name of a method of the root.
    """
    steps: list[tuple[Group | Names | str, bool]] = []
    pending: list[Part] = []

    def flush(emit: bool = False) -> None:
        if pending:
            steps.append((group(pending), emit))
            pending.clear()

    for index, step in enumerate(recipe.steps):
        emit = index in recipe.emit
        if isinstance(step, Part):
            pending.append(step)
            if emit:
                flush(True)
        else:
            flush()
            steps.append((tuple(rec.path(step.node).split(".")) if step.node else step.name, emit))
    flush()
    return tuple(steps)


def follow(module: Any, path: Sequence[str]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module
