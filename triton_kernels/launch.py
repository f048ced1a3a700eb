"""A planned kernel launch, and the short way to the driver once the kernel is compiled.

Triton's own launch path binds and hashes every argument on each call (10 to 20 us). Here the arguments other than
addresses are fixed when a call is planned; from the second call on the compiled kernel is started directly. Addresses
must keep the 16-byte alignment that they had when the kernel was compiled.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from .hopper import compiled_soundly, series, tile_layout

__all__ = [
    "Arg",
    "Launch",
    "OutOfResources",
    "current_device",
    "current_stream",
    "dependent_programs",
    "direct",
    "interpreted",
]

# (name of a tensor of the call, offset in bytes, dtype), a tensor that lives as long as the plan, or a Mapped
Arg = "Tensor | tuple[str, int, torch.dtype] | Mapped"


def interpreted() -> bool:
    """Whether kernels run in the interpreter (TRITON_INTERPRET=1 before the kernels were imported)."""
    return bool(knobs.runtime.interpret)


@functools.cache
def dependent_programs() -> int:
    """Of how many programs a kernel of one image may be that is started before the one before it has ended
    (programmatic dependent launch, see `common.begin`); 0 without. NVIDIA GPUs from compute capability 9.0 on, if all
    are; MNV4_OPS_DEPENDENT_LAUNCH=0 forbids it. Kernels with more to do lose by it, unless they say otherwise (see
    `Build`): their programs crowd where the last ones of the kernel before have left room.
    """
    if interpreted() or torch.version.cuda is None:
        return 0
    count = torch.cuda.device_count()
    if count == 0 or any(torch.cuda.get_device_capability(i) < (9, 0) for i in range(count)):
        return 0
    return int(os.environ.get("MNV4_OPS_DEPENDENT_LAUNCH", "144"))


def current_stream(device: int) -> int:
    """Handle of torch's current stream on a device."""
    return int(driver.active.get_current_stream(device))


def current_device() -> int:
    """Index of torch's current device."""
    return int(driver.active.get_current_device())


def direct(launch: Launch) -> tuple[Any, tuple[int, int, int], tuple[Any, ...], list[tuple[Any, int]], tuple[Any, ...]]:
    """`launch.parts()`, past the Python part of Triton's launcher where that only adds constants."""
    run, grid, (function, *rest), pointers, tail = launch.parts()
    plain = type(run).__name__ == "CudaLauncher" and not any(
        getattr(run, name, False) for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    )
    if plain and series() == "3.6":
        head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
        return run.launch, grid, head, pointers, tail
    if plain and series() in ("3.7", "3.8"):
        return _packed(run, function, rest), grid, (), pointers, tail
    return run, grid, (function, *rest), pointers, tail


def _packed(launcher: Any, function: Any, rest: Sequence[Any]) -> Any:
    """What takes grid, stream and the kernel's arguments; these go on as one tuple."""
    start = launcher.launch
    before = (function, launcher.launch_cooperative_grid, launcher.launch_pdl, *rest, None, None)
    before += launcher.arg_annotations, launcher.kernel_signature

    def run(x: int, y: int, z: int, stream: int, *args: Any) -> None:
        start(x, y, z, stream, *before, args)

    return run


class _Base:
    """What a descriptor wants of a tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


class Mapped:
    """A 16-bit matrix at an address of the call as Hopper's copy engine sees it: rows without gaps, moved in blocks."""

    __slots__ = ("_descriptor", "address")

    def __init__(self, address: tuple[str, int, torch.dtype], shape: Sequence[int], block: Sequence[int]) -> None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        self.address = address
        self._descriptor = TensorDescriptor(
            _Base(0, address[2]), list(shape), [shape[1], 1], list(block), tile_layout(block[1])
        )

    def at(self, address: int) -> Any:
        """The kernel's argument, once the address is known."""
        found = copy.copy(self._descriptor)
        found.base = _Base(address, self.address[2])
        return found


Mappings = tuple[tuple[int, Mapped], ...]


def described(addresses: list[Any], mapped: Mappings) -> list[Any]:
    """Addresses, those of `mapped` as descriptors."""
    for i, how in mapped:
        addresses[i] = how.at(addresses[i])
    return addresses


class Launch:
    """One kernel start: `addresses` in the order of the kernel's first parameters, then `scalars`, then constants.

    `mapped`: which of the addresses the kernel takes by descriptors.
    """

    __slots__ = (
        "_constants", "_fast", "_grid", "_kernel", "_options", "_plain", "_pointers", "_scalars", "_tail", "mapped",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        addresses: Sequence[Any],
        scalars: dict[str, Any],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._plain = tuple(addresses)
        self.mapped: Mappings = tuple((i, a) for i, a in enumerate(addresses) if isinstance(a, Mapped))
        plain = [a.address if isinstance(a, Mapped) else a for a in addresses]
        self._pointers = [a if isinstance(a, tuple) else (None, a.data_ptr(), a.dtype) for a in plain]
        self._scalars, self._constants, self._options = scalars, constants, options
        self._tail = (*scalars.values(), *constants.values())
        self._fast: Any = None

    def compile(self) -> Any:
        """Compiles without launching (fills Triton's cache); needs no tensors."""
        args: list[Any] = [dtype for _, _, dtype in self._pointers]
        for i, how in self.mapped:
            args[i] = how.at(0)
        more = {**self._scalars, **self._constants, **self._options}
        return compiled_soundly(self._kernel, lambda: self._kernel.warmup(*args, grid=self._grid, **more))

    def first(self, tensors: dict[str, Tensor]) -> None:
        """Launches by Triton's own path and remembers the compiled kernel."""
        args: list[Any] = [
            a.at(tensors[a.address[0]].data_ptr() + a.address[1]) if isinstance(a, Mapped) else self._view(tensors, a)
            for a in self._plain
        ]
        more = {**self._scalars, **self._constants, **self._options}
        compiled = compiled_soundly(self._kernel, lambda: self._kernel[self._grid](*args, **more))
        if compiled is not None and hasattr(compiled, "packed_metadata"):
            self._fast = (compiled.run, compiled.function, compiled.packed_metadata)

    @property
    def ready(self) -> bool:
        return self._fast is not None

    def again(self, base: dict[str | None, int], stream: int) -> None:
        """Launches the compiled kernel; `base` maps the names of the call's tensors to addresses, None to 0."""
        run, function, metadata = self._fast
        x, y, z = self._grid
        addresses = described([base[name] + offset for name, offset, _ in self._pointers], self.mapped)
        run(x, y, z, stream, function, metadata, None, None, None, *addresses, *self._tail)

    def parts(self) -> tuple[Any, tuple[int, int, int], tuple[Any, ...], list[tuple[Any, int]], tuple[Any, ...]]:
        """(function to call, grid, what follows grid and stream, addresses as (name, offset), what follows them)."""
        run, function, metadata = self._fast
        pointers = [(name, offset) for name, offset, _ in self._pointers]
        return run, self._grid, (function, metadata, None, None, None), pointers, self._tail

    @staticmethod
    def _view(tensors: dict[str, Tensor], address: Any) -> Tensor:
        if not isinstance(address, tuple):
            return address
        name, offset, dtype = address
        storage = tensors[name]
        if storage.dtype == torch.uint8 and dtype != torch.uint8:
            return storage[offset:].view(dtype)
        return storage if offset == 0 else _shifted(storage, offset)


def _shifted(t: Tensor, offset: int) -> Tensor:
    flat = t.as_strided((1,), (1,), t.storage_offset() + offset // t.element_size())
    return flat
