"""`torch.ops.mnv4.program`: blocks back to back as one op, what a compiled model calls.

`recipe` says which ops of `mnv4_ops.ops` run, as JSON text: a list of `[op, present, args]`; `present` has a 1 for
each entry of the params of the op that is a tensor and a 0 for each that is None. `params` holds the tensors that are
present and `eps` the numbers, of one op after the other. Input and output are those of the first and of the last op.
"""

from __future__ import annotations

import functools
import inspect
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from mnv4_ops import _native, cache

from .backends import BY_DEVICE
from .layout import LAYOUTS, STAGES, Layout, Params, check_input, empty_output, name_of

SCHEMA = "(Tensor x, Tensor[] params, float[] eps, str recipe) -> Tensor"
# programs that are kept; their packed weights are bounded in `cache`
KEPT = 64


class _Step(NamedTuple):
    op: str
    present: str
    args: tuple[Any, ...]


class _Piece(NamedTuple):
    """An op of a program with its parameters."""

    layout: Layout
    params: list[Tensor | None]
    eps: list[float]


def recipe_of(steps: Sequence[tuple[str, Params, Sequence[Any]]]) -> str:
    """The text for ops with these `params` and arguments after `eps`."""
    found = [[op, "".join("01"[t is not None] for t in params), list(args)] for op, params, args in steps]
    return json.dumps(found, separators=(",", ":"))


def _error(expected: str, got: object) -> ValueError:
    return ValueError(f"mnv4::program: expected {expected}, got {got}")


@functools.lru_cache(maxsize=KEPT)
def _parse(recipe: str) -> tuple[_Step, ...]:
    try:
        steps = tuple(_Step(op, present, tuple(args)) for op, present, args in json.loads(recipe))
    except (TypeError, ValueError) as error:
        raise _error("recipe to be a JSON list of [op, present, args]", f"{recipe!r} ({error})") from None
    if not steps:
        raise _error("recipe with at least one op", recipe)
    for index, (op, present, args) in enumerate(steps):
        if not isinstance(op, str) or op not in LAYOUTS:
            raise _error(f"op {index} of recipe to be one of {', '.join(LAYOUTS)}", repr(op))
        # after params and eps
        for value, parameter in zip(args, list(inspect.signature(LAYOUTS[op]).parameters.values())[2:], strict=False):
            if type(value).__name__ != parameter.annotation:
                raise _error(f"{parameter.name} of op {index} of recipe to be a {parameter.annotation}", repr(value))
        if op == "head" and index + 1 < len(steps):
            raise _error("head to be the last op of recipe", f"op {index} of {len(steps)}")
        if not isinstance(present, str) or set(present) - {"0", "1"}:
            raise _error(f"a 0 or 1 for each of the params of op {index} of recipe", repr(present))
    return steps


def _pieces(x: Tensor, params: Sequence[Tensor], eps: Sequence[float], recipe: str) -> list[_Piece]:
    """Checks everything: each op, and that it takes what the one before gives."""
    steps = _parse(recipe)
    check_input("program", x, None)
    tensors, numbers = sum(step.present.count("1") for step in steps), sum(len(STAGES[step.op]) for step in steps)
    if len(params) != tensors:
        raise _error(f"params to hold the {tensors} tensors of recipe", len(params))
    if len(eps) != numbers:
        raise _error(f"eps to hold {numbers} numbers, one per stage", len(eps))
    pieces: list[_Piece] = []
    channels, at, number = x.shape[1], iter(params), 0
    for op, present, args in steps:
        own: list[Tensor | None] = [next(at) if flag == "1" else None for flag in present]
        own_eps = list(eps[number : number + len(STAGES[op])])
        number += len(own_eps)
        try:
            layout = LAYOUTS[op](own, own_eps, *args, *([channels] if op == "head" else []))
        except TypeError as error:
            raise _error(f"the arguments of mnv4::{op} in recipe", f"{args} ({error})") from None
        if layout.query_stride > 1:
            raise _error(f"mnv4::{op} with query_stride 1", layout.query_stride)
        if layout.c_in != channels:
            before = f"mnv4::{pieces[-1].layout.op} before it" if pieces else "x"
            raise _error(f"mnv4::{op} with {channels} input channels like {before}", layout.c_in)
        if layout.dtype is not None and layout.dtype is not x.dtype:
            raise _error(f"params of dtype {name_of(x.dtype)} like x", name_of(layout.dtype))
        if layout.device is not None and layout.device != x.device:
            raise _error(f"params on {x.device} like x", layout.device)
        if layout.dtype is None:  # a bare pool
            layout = replace(layout, dtype=x.dtype, device=x.device)
        pieces.append(_Piece(layout, own, own_eps))
        channels = layout.c_out
    return pieces


def layouts(x: Tensor, params: Sequence[Tensor], eps: Sequence[float], recipe: str) -> list[Layout]:
    """The ops of a call, checked."""
    return [piece.layout for piece in _pieces(x, params, eps, recipe)]


class _Kept:
    """A program with the versions and statistics of its parameters when they were checked and packed."""

    def __init__(self, pieces: list[_Piece], versions: Any, backend: Any) -> None:
        self.versions, self.c_in = versions, pieces[0].layout.c_in
        self.generation = cache.generation()
        self.owner: Any = None
        self._statistics = _watch(pieces, backend)
        self._seen = self._statistics()
        natives = [cache.packed_for_tensors(*piece, backend) for piece in pieces]
        self.run = backend.program([(n, piece.layout) for n, piece in zip(natives, pieces, strict=True)]).run

    def stands(self, versions: Any) -> bool:
        return (
            self.versions == versions and self.generation == cache.generation() and (self._statistics() == self._seen)
        )


def _watch(pieces: list[_Piece], backend: Any) -> Callable[[], Any]:
    """Gives something that changes with the running statistics, as long as these stay where they are."""
    if not backend.EXACT:
        return cache.epoch
    watched: Callable[[], Any] = backend.watch([(piece.layout, piece.params) for piece in pieces])
    return watched


_programs: OrderedDict[Any, _Kept] = OrderedDict()
_lock = threading.Lock()


def fake(x: Tensor, params: list[Tensor], eps: list[float], recipe: str) -> Tensor:
    shape = x
    for layout in layouts(x, params, eps, recipe):
        shape = empty_output(layout, shape)
    return shape


def kernel(device: str) -> Callable[..., Tensor]:
    """The implementation for a type of device."""

    def run(x: Tensor, params: list[Tensor], eps: list[float], recipe: str) -> Tensor:
        backend = BY_DEVICE[device]
        if _native.core is None:
            raise RuntimeError(f"mnv4::program: {backend.unavailable()}")
        addresses, versions = _native.core.fingerprint(params)
        key = (recipe, tuple(eps), addresses)
        kept = _programs.get(key)
        if kept is None or not kept.stands(versions):
            kept = _keep(key, _pieces(x, params, eps, recipe), params, versions, backend)
        check_input("program", x, kept.c_in)
        if params and (x.dtype is not params[0].dtype or x.device != params[0].device):
            _pieces(x, params, eps, recipe)  # says what is wrong
        out: Tensor = kept.run(x.resolve_neg())
        return out

    return run


def _keep(key: Any, pieces: list[_Piece], params: list[Tensor], versions: Any, backend: Any) -> _Kept:
    kept = _Kept(pieces, versions, backend)
    with _lock:
        _programs.pop(key, None)
        if params:
            # goes with the parameters
            kept.owner = weakref.ref(params[0], lambda _: _programs.pop(key, None))
            _programs[key] = kept
            while len(_programs) > KEPT:
                _programs.popitem(last=False)
    return kept
