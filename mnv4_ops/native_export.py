"""Exported files that run the fused CPU kernels, also where there is no Python.

`mnv4_ops.export(model, args)` is `torch.export.export` with one op, `mnv4::native_program`, in the place of the blocks
that have kernels. Its arguments are the raw parameters, so nothing that depends on the machine is in the file, and
constants keep the names that they have in the model. The op lives in a library without Python,
`mnv4_ops.native_library()`: a C++ host opens it with dlopen before it loads a package of AOTInductor; in Python
`mnv4_ops.load_native_library()` does that.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnv4_ops import _native, cache
from mnv4_ops.adapters import TARGETS
from mnv4_ops.adapters.record import Names, Part, Recipe, Recorder, Unsupported, follow, grouped
from mnv4_ops.ops import cpu
from mnv4_ops.ops.layout import PER_STAGE, Layout
from mnv4_ops.serve import describer
from mnv4_ops.spec import ACTS, PADDINGS

NAME = "libmnv4_ops_torch.so"
FORMAT = "mnv4 1"

_lock = threading.RLock()


def native_library() -> Path:
    """The library with `mnv4::native_program`: no Python in it, for any torch from 2.10 on.

    RuntimeError where it was not built.
    """
    if _native.core is None:
        raise RuntimeError(f"mnv4_ops.native_library: {cpu.unavailable()}")
    path = Path(str(_native.core.__file__)).with_name(NAME)
    if not path.exists():
        raise RuntimeError(f"mnv4_ops.native_library: expected {NAME} beside the native library, found none")
    return path


def load_native_library() -> None:
    """Registers `mnv4::native_program` in this process, once. RuntimeError with a torch before 2.10."""
    with _lock:
        if _registered():
            return
        torch.ops.load_library(native_library())
        if not _registered():
            raise RuntimeError(f"mnv4_ops.load_native_library: expected torch >= 2.10, got {torch.__version__}")
        torch.library.register_fake("mnv4::native_program", _fake)
        torch.library.register_autograd("mnv4::native_program", _backward)


def _registered() -> bool:
    return hasattr(torch.ops.mnv4, "native_program")


def _backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("mnv4::native_program: expected no call of backward, exported kernels are for inference only")


def _fields(line: str) -> dict[str, int]:
    return {
        name: int(value) for name, _, value in (word.partition("=") for word in line.split()[1:]) if name != "stage"
    }


def _fake(x: Tensor, params: Sequence[Tensor], eps: Sequence[float], program: str) -> Tensor:
    n, c, h, w = x.shape
    for line in program.splitlines()[1:]:
        fields = _fields(line)
        c_in = fields["c"] if line.startswith("MobileMQA") else fields["c_in"]
        torch._check(c == c_in, functools.partial("mnv4::native_program: expected x with {} channels".format, c_in))
        if line.startswith("Block"):
            c = fields["c_out"]
            for stage in ("start", "expand", "mid"):
                s = fields.get(f"{stage}_stride", 1)
                h, w = (h, w) if s == 1 else ((h + s - 1) // s, (w + s - 1) // s)
        elif line.startswith("Head"):
            return x.new_empty((n, fields["classes"] or fields["c_hidden"] or fields["c_feat"] or c_in))
    return torch.empty((n, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _number(name: str, value: Any) -> int:
    if name.endswith("act"):
        return ACTS.index(value)
    return PADDINGS.index(value) if name == "padding" else int(value)


def _text(parts: Sequence[Part], layouts: Sequence[Layout]) -> str:
    """The operations for csrc/torch/description.h; indices count the tensors that are present."""
    lines, tensors, numbers = [FORMAT], 0, 0
    for part, layout in zip(parts, layouts, strict=True):
        where = []
        for t in part.params:
            where.append(-1 if t is None else tensors)
            tensors += t is not None
        words = [f"{layout.native_class} " + " ".join(f"{k}={_number(k, v)}" for k, v in layout.native)]
        for stage, base in layout.stages:
            gamma = where[layout.gamma] if layout.gamma is not None and stage == layout.gamma_stage else -1
            indices = [stage, *where[base : base + len(PER_STAGE)], gamma, numbers + base // len(PER_STAGE)]
            words.append("stage=" + ",".join(map(str, indices)))
        numbers += len(part.eps)
        lines.append(" ".join(words))
    return "\n".join(lines)


class _Group(NamedTuple):
    """Parts in a row as one call of the op."""

    paths: tuple[Names, ...]  # of the params
    eps: tuple[float, ...]
    program: str


class _Outline(NamedTuple):
    # a group, the path of a module, or the name of a method of the module; and whether the output is a feature
    steps: tuple[tuple[_Group | Names | str, bool], ...]
    pyramid: bool
    c_in: int


def _outline(module: nn.Module, describe: Callable[[Recorder], Part | Recipe], pyramid: bool) -> _Outline:
    """Unsupported or ValueError says why the module is left as it is."""
    rec = Recorder(module)
    found = describe(rec)
    recipe = Recipe([found]) if isinstance(found, Part) else found
    if rec.guard().check(module, False):
        raise Unsupported("a module is in training mode or has hooks or a forward of its own")
    channels: list[int] = []

    def group(parts: list[Part]) -> _Group:
        layouts = [_layout(part) for part in parts]
        channels.append(layouts[0].c_in)
        tensors = [t for part in parts for t in part.params if t is not None]
        paths = tuple(path for path in rec.tensor_paths(tensors) if path is not None)
        return _Group(paths, tuple(e for part in parts for e in part.eps), _text(parts, layouts))

    steps = grouped(rec, recipe, group)
    if not channels:
        raise Unsupported("no block has a kernel")
    return _Outline(steps, pyramid, channels[0])


def _layout(part: Part) -> Layout:
    layout = cache.layout_of(part)
    if layout.device not in (None, torch.device("cpu")) or layout.dtype not in (None, torch.float32):
        raise Unsupported(f"expected float32 parameters on the CPU, got {layout.dtype} on {layout.device}")
    if layout.query_stride > 1:
        raise Unsupported("whether pooled queries have a kernel depends on the size of the input")
    cpu.build(layout)
    return layout


def _run(module: Any, outline: _Outline, x: Any) -> Any:
    features = []
    for step, emit in outline.steps:
        if isinstance(step, _Group):
            params = [follow(module, path) for path in step.paths]
            x = torch.ops.mnv4.native_program(x, params, list(step.eps), step.program)
        else:
            x = getattr(module, step)(x) if isinstance(step, str) else follow(module, step)(x)
        if emit:
            features.append(x)
    return features if outline.pyramid else x


def _outlines(model: nn.Module) -> tuple[dict[tuple[int, str], _Outline], dict[str, str]]:
    """By module and method; and why the others are left, by name."""
    found: dict[tuple[int, str], _Outline] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        for target in TARGETS:
            cls = getattr(sys.modules.get(target.module), target.cls, None)
            if cls is None or type(module) is not cls:
                continue
            pyramid = "feature_pyramid" in target.plans
            try:
                outline = _outline(module, describer(target, cls, target.plans[0]), pyramid)
            except (Unsupported, ValueError) as error:
                reasons.setdefault(name or "(model)", str(error))
            else:
                found[id(module), target.method] = outline
    return found, reasons


@contextlib.contextmanager
def _replaced(outlines: dict[tuple[int, str], _Outline]) -> Iterator[None]:
    """While it is open, the modules call the op. Whatever was enabled meanwhile is as it was afterwards."""
    undo = []
    for target in TARGETS:
        cls = getattr(sys.modules.get(target.module), target.cls, None)
        if cls is None:
            continue
        before = cls.__dict__[target.method]

        def forward(self: Any, x: Any, *args: Any, _before: Any = before, _name: str = target.method, **kw: Any) -> Any:
            outline = outlines.get((id(self), _name))
            plain = isinstance(x, Tensor) and x.dim() == 4 and x.dtype is torch.float32 and x.device.type == "cpu"
            if outline is None or args or kw or not plain or x.shape[1] != outline.c_in:
                return _before(self, x, *args, **kw)
            return _run(self, outline, x)

        undo.append((cls, target.method, before))
        setattr(cls, target.method, forward)
    try:
        yield
    finally:
        for cls, method, before in undo:
            setattr(cls, method, before)


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """`torch.export.export` of a float32 CPU model in eval mode, with the fused kernels in the graph.

    Arguments as there. The program holds `mnv4::native_program` for what has a kernel, in the whole model or block by
    block, and the original layers for the rest. It runs in Python after `load_native_library()`, and compiled by
    `torch._inductor.aoti_compile_and_package` in C++ (docs/ecosystem.md). `enable()` makes no difference to it.

    The op packs weights in its first call and again when they change. In each call it compares tensors of up to 8192
    elements as a whole, larger ones by their address and 16 of their elements: after a change of others alone call
    `mnv4_ops_repack()` of the library.

    ValueError if no module of the model has a kernel; RuntimeError with a torch before 2.10.
    """
    load_native_library()
    with _lock, torch.no_grad():
        outlines, reasons = _outlines(model)
        if not outlines:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no module of a known class"
            raise ValueError(f"mnv4_ops.export: expected a model with blocks that have a kernel, got none ({why})")
        with _replaced(outlines):
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
