"""The interface of an op of the benchmark: which cases it has, a plain module to compare with, and our call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from mnv4_ops import _native, check
from mnv4_ops.bench.peers.base import Run, Unsupported
from mnv4_ops.ops.layout import dtypes_of
from mnv4_ops.reference.functional import ConvBN
from mnv4_ops.spec import HeadSpec, Spec, ledger

Example = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op at one input size; `places` are the rows of the ledger that have it, `model row`."""

    op: str
    spec: Any
    height: int
    width: int
    shape: str
    places: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shape} @{self.height}x{self.width}"


class Op:
    """A new op is a new file in this folder with a subclass that has a `name`. Everything else has a default for specs
    of `mnv4_ops.spec`: a subclass says in `specs` what of a model belongs to it, and in `shape` how to call that.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    order: ClassVar[int] = 100

    def specs(self, spec: Spec, h: int, w: int) -> Iterator[tuple[Any, int, int]]:
        """(spec, rows, columns) of this op inside a row of the ledger with an input of h x w pixels."""
        raise NotImplementedError

    def shape(self, spec: Any) -> str:
        """Channels and kernels in short, e.g. `96-384-96 k3,5 s2`."""
        raise NotImplementedError

    def rows(self, model: str, resolution: int | None) -> Iterator[tuple[str, Spec, int, int]]:
        """(row, spec, rows, columns) of a model: those of the ledger."""
        for entry in ledger(model, resolution):
            yield entry.name, entry.spec, entry.height, entry.width

    def cases(self, models: Sequence[str], resolution: int | None = None) -> list[Case]:
        """Distinct cases of some models, in order of execution."""
        found: dict[tuple[Any, int, int], list[str]] = {}
        for model in models:
            for row, spec, h, w in self.rows(model, resolution):
                for key in self.specs(spec, h, w):
                    found.setdefault(key, []).append(f"{model} {row}")
        return [
            Case(self.name, spec, h, w, self.shape(spec), tuple(dict.fromkeys(places)))
            for (spec, h, w), places in found.items()
        ]

    def tiny(self, case: Case) -> Case:
        """The same op at a size at which only correctness can be seen."""
        return replace(case, height=min(case.height, 9), width=min(case.width, 7))

    def module(self, case: Case) -> torch.nn.Module:
        """Plain torch in float32, eval mode, everything random; `ours` is made from it."""
        return check.random_module(case.spec)

    def module_on(self, case: Case, device: str) -> torch.nn.Module:
        """The module to compare with on a device, where the best form depends on it; float32 on the CPU."""
        return self.module(case)

    def example(self, case: Case, batch: int) -> Example:
        """Random float32 input(s): [batch, C, rows, columns] unless an op says otherwise."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, case.spec.channels[0], case.height, case.width, generator=generator)

    def macs(self, case: Case) -> int:
        """Multiply-accumulates for one image."""
        return int(case.spec.macs(case.height, case.width))

    def bytes(self, case: Case, batch: int, itemsize: int) -> int:
        """Bytes of input and weights read once and of the output written once."""
        spec, pixels = case.spec, case.height * case.width
        ho, wo = spec.out_hw(case.height, case.width)
        moved = spec.channels[0] * pixels + spec.channels[1] * ho * wo
        return itemsize * (batch * moved + spec.weights())

    def refuses(self, dtype: torch.dtype, device: str) -> str | None:
        """Why mnv4_ops has no kernel for it, None if it has."""
        if _native.core is None:
            return f"no native library: {_native.reason}"
        if dtype not in dtypes_of(torch.device(device)):
            return f"no kernels in {str(dtype).removeprefix('torch.')} on {device}"
        return None

    def ours(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        """Our call on `x`, to be timed: in float32 on the CPU the native object alone, else the enabled module."""
        if x.dtype is torch.float32 and x.device.type == "cpu":
            return native_call(self.native(module, case), case.spec, x, threads, module)
        return self.called(module, case, x, threads)

    def called(self, module: Any, case: Case, x: Any, threads: int) -> Run:
        """Where `ours` is no native object: the enabled module, or what else a user calls."""
        return enabled_call(module, x, threads)

    def native(self, module: Any, case: Case) -> Any:
        """The packed native object of a module."""
        return check.native_block(case.spec, module.params())


def native_call(native: Any, spec: Any, x: torch.Tensor, threads: int, keep: Any) -> Run:
    """Runs a native object on channels_last `x`; the output buffer is reused."""
    x = x.to(memory_format=torch.channels_last)
    n, _, h, w = x.shape
    if isinstance(spec, HeadSpec):
        out = torch.empty(n, spec.features)
    else:
        ho, wo = spec.out_hw(h, w)
        out = torch.empty(n, ho, wo, spec.channels[1]).permute(0, 3, 1, 2)
    arguments = (x.data_ptr(), n, h, w, tuple(x.stride()), out.data_ptr(), threads)

    def run(_keep: Any = (x, keep)) -> torch.Tensor:
        native.run(*arguments)
        return out

    return run


def enabled_call(module: Any, x: torch.Tensor, threads: int) -> Run:
    """The enabled module, as a user has it; Unsupported where a part would run its original forward."""
    import copy

    import mnv4_ops

    torch.set_num_threads(threads)
    # a kernel serves the children of a container, and a block is taken as a child of one
    own = torch.nn.Sequential(copy.deepcopy(module))
    x = x.to(memory_format=torch.channels_last)
    mnv4_ops.enable(own)
    original = list(mnv4_ops.explain(own, x).fallbacks)
    if original:
        raise Unsupported(f"the original forward runs: {original[0].by}")
    return lambda: own(x)


def raw_call(name: str, stages: Sequence[ConvBN], x: torch.Tensor, threads: int, *options: Any) -> Run:
    """`torch.ops.mnv4.<name>` on the parameters of some stages: of what is no block that `enable()` takes."""
    torch.set_num_threads(threads)
    function = getattr(torch.ops.mnv4, name)
    params: list[torch.Tensor | None] = []
    for stage in stages:
        params += [stage.weight, stage.bias, *(stage.bn[:4] if stage.bn is not None else (None,) * 4)]
    eps = [0.0 if stage.bn is None else stage.bn.eps for stage in stages]
    x = x.to(memory_format=torch.channels_last)
    return lambda: function(x, params, eps, *options)
