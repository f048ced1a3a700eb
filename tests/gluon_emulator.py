"""Runs kernels in Gluon on the CPU: the functions of the kernels as they are, on stand-ins for the language.

A tile is a tensor of torch, its layout is nothing, a program runs after another one, groups of warps run as threads.
What the device does later is done as late as it may be, or at once, whichever hurts: a product reads shared memory when
it is waited for, copies to shared memory arrive when they are waited for or (`LATE` false) at once. So a place that is
overwritten too early, or read too early, makes a wrong result. Errors: a product used that was not waited for, memory
outside of a tensor, a wait for something that never comes. Not seen: barriers that are missing between warps.
"""

from __future__ import annotations

import builtins
import inspect
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from mnv4_ops.triton_kernels.launch import Launch, Mapped

from mnv4_ops import triton_kernels

LATE = False
# (words, what stands in their place) by module, to see what a wrong kernel does
EDITS: dict[str, tuple[str, str]] = {}
SECONDS = 30.0
_FOLDER = Path(triton_kernels.__file__).parent


def unwrapped(value: Any) -> Any:
    assert not isinstance(value, Product), "a product is used that was not waited for"
    return value.t if isinstance(value, Value) else value


def tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(unwrapped(value))


def _binary(name: str) -> Any:
    def run(self: Any, other: Any) -> Any:
        if isinstance(other, Pointer):
            return getattr(other, name)(self)
        return Value(getattr(tensor(self), name)(unwrapped(other)))

    return run


class Value:
    """A tile in registers, or a number."""

    def __init__(self, t: Any) -> None:
        self.t = torch.as_tensor(t)

    def to(self, dtype: torch.dtype) -> Value:
        return Value(unwrapped(self).to(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(unwrapped(self)[at])

    def __index__(self) -> int:
        return int(unwrapped(self))

    def __bool__(self) -> bool:
        return bool(unwrapped(self))

    def __neg__(self) -> Value:
        return Value(-unwrapped(self))

    def __rtruediv__(self, other: float) -> Value:
        return Value(other / unwrapped(self))

    def __rsub__(self, other: Any) -> Value:
        return Value(other - unwrapped(self))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(unwrapped(self).shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("add", "mul", "and", "or", "xor"):
    setattr(Value, f"__r{_name}__", getattr(Value, f"__{_name}__"))
Value.__hash__ = object.__hash__  # type: ignore[method-assign]


class Product(Value):
    """A product in flight: its operands are read, and its sum is there, when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.done = a, b, acc, use_acc, False

    def run(self) -> None:
        a, b = (x.t.float() for x in (self.a, self.b))
        acc = self.acc
        if isinstance(acc, Product):
            assert acc.done
        self.t = a @ b + (acc.t if self.use_acc else 0.0)
        assert self.t.dtype == torch.float32
        self.done = True


class Pointer:
    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, unwrapped(self.offset) + unwrapped(other))

    __radd__ = __add__

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        index = tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else unwrapped(mask))
        index, mask = torch.broadcast_tensors(index, mask)
        used = index[mask]
        if used.numel():
            assert used.min() >= 0, "in front of the tensor"
            assert used.max() < len(self.memory), "behind the tensor"
        return index, mask


class Shared:
    """A tile in shared memory, at first of NaN."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.t.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.t.dtype

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.t.shape[0]
        return Shared(self.t[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.t.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.t.permute(order))

    def load(self, layout: Any) -> Value:
        return Value(self.t.clone())

    def store(self, value: Value) -> None:
        assert unwrapped(value).dtype == self.t.dtype
        self.t.copy_(unwrapped(value).expand(self.t.shape))

    def _reinterpret(self, dtype: torch.dtype, shape: Any, layout: Any) -> Shared:
        flat = self.t.view(-1).view(torch.uint8)
        size = torch.Size(shape).numel() * dtype.itemsize
        assert size <= flat.numel()
        return Shared(flat[:size].view(dtype).view(*shape))


class Descriptor:
    """What the copy engine sees; zeros outside."""

    def __init__(self, memory: torch.Tensor, shape: Any, strides: Any, block: Any) -> None:
        self.t = torch.as_strided(memory, tuple(shape), tuple(strides))
        self.block, self.dtype = tuple(block), memory.dtype

    def box(self, at: Any) -> tuple[Any, Any]:
        """Where the block lies in the tensor, and that part of the block."""
        ends = [(int(i), int(i) + b, s) for i, b, s in zip(at, self.block, self.t.shape, strict=True)]
        outer = tuple(slice(max(a, 0), max(min(e, s), max(a, 0))) for a, e, s in ends)
        inner = tuple(slice(o.start - a, o.stop - a) for o, (a, _, _) in zip(outer, ends, strict=True))
        return outer, inner


class Barrier:
    def __init__(self) -> None:
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = 0
        self.late: list[Any] = []

    def arrive(self, count: int, size: int = 0) -> None:
        with _meeting:
            assert self.count > 0, "a barrier that was not made"
            self.left -= count
            self.bytes += size
            assert self.left >= 0, "more arrivals than the barrier counts"
            self._settle()

    def arrived(self, size: int) -> None:
        with _meeting:
            self.bytes -= size
            self._settle()

    def _settle(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phase += 1
            _meeting.notify_all()

    def wait(self, parity: int) -> None:
        with _meeting:
            late, self.late = self.late, []
        for copy in late:
            copy()
        with _meeting:
            came = _meeting.wait_for(lambda: self.phase & 1 != parity, _group.patience)
            assert came, "a wait for what never comes"


_meeting = threading.Condition(threading.RLock())


class _Group(threading.local):
    """What a group of warps has in flight."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.copies: list[list[Any]] = [[]]
        self.stores: list[Any] = []
        self.program = (0, 0, 0)
        # seconds for which others may yet arrive
        self.patience = 0.0


_group = _Group()


def _load(p: Pointer, mask: Any = None, other: Any = None) -> Value:
    index, inside = p.places(mask)
    found = p.memory[torch.where(inside, index, 0)]
    if not bool(inside.all()):
        assert other is not None, "nothing to put where the mask is false"
        found = torch.where(inside, found, torch.as_tensor(other, dtype=found.dtype))
    return Value(found)


def _store(p: Pointer, value: Any, mask: Any = None) -> None:
    index, inside = p.places(mask)
    value = tensor(value).expand(index.shape)
    assert value.dtype == p.memory.dtype
    p.memory[index[inside]] = value[inside]


class _Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


def _allocated(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return _Barriers(shape[0]) if len(shape) > 1 else Barrier()
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def _assembly(words: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int) -> Value:
    assert words == "mov.u32 $0, 0;", "assembly that is not known here"
    return Value(0)


def _halves(x: Value) -> tuple[Value, Value]:
    return x[..., 0], x[..., 1]


def _two(run: Any) -> Any:
    return lambda a, b: Value(run(*torch.broadcast_tensors(*(tensor(x) for x in (a, b)))))


def _specialize(functions: Any, warps: Any, registers: Any = None) -> None:
    failures: list[BaseException] = []
    program = _group.program

    def run(function: Any, args: Any) -> None:
        _group.program, _group.patience = program, SECONDS
        try:
            function(*args)
            _finish()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _layout(*args: Any, **more: Any) -> None:
    return None


language = SimpleNamespace(
    constexpr=None, float32=torch.float32, int32=torch.int32, int64=torch.int64,
    arange=lambda start, end, layout=None: Value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
    load=_load, store=_store,
    where=lambda c, a, b: Value(torch.where(*(tensor(x) for x in (c, a, b)))),
    exp2=lambda x: Value(unwrapped(x).exp2()),
    fma=lambda a, b, c: Value((tensor(a).double() * unwrapped(b) + unwrapped(c)).float()),
    maximum=_two(torch.maximum), minimum=_two(torch.minimum),
    max=lambda x, axis: Value(unwrapped(x).amax(axis)), sum=lambda x, axis: Value(unwrapped(x).sum(axis)),
    permute=lambda x, order: Value(unwrapped(x).permute(order)),
    reshape=lambda x, shape: Value(unwrapped(x).reshape(shape)),
    split=_halves, convert_layout=lambda x, layout, assert_trivial=False: x,
    program_id=lambda axis: Value(_group.program[axis]), allocate_shared_memory=_allocated,
    static_range=range, static_assert=lambda ok: None, inline_asm_elementwise=_assembly,
    barrier=lambda: None, thread_barrier=lambda: None, warp_specialize=_specialize,
    SliceLayout=_layout, BlockedLayout=_layout, NVMMADistributedLayout=_layout, DotOperandLayout=_layout,
    NVMMASharedLayout=_layout, SwizzledSharedLayout=_layout,
)  # fmt: skip


def _later(run: Any, queue: list[Any]) -> None:
    if LATE:
        queue.append(run)
    else:
        run()


def _copy_rows(tile: Shared, p: Pointer, mask: Any = None) -> None:
    _later(lambda: tile.store(_load(p, mask, 0.0)), _group.copies[-1])


def _wait_group(left: int) -> None:
    while len(_group.copies) > left + 1:
        for run in _group.copies.pop(0):
            run()


def _fetch(desc: Descriptor, at: Any, bar: Barrier, tile: Shared, pred: Any = True) -> None:
    if not pred:
        return
    outer, inner = desc.box(at)

    def run() -> None:
        block = torch.zeros(desc.block, dtype=desc.dtype)
        block[inner] = desc.t[outer]
        tile.t.copy_(block.view(tile.t.shape))
        bar.arrived(tile.t.numel() * tile.t.element_size())

    _later(run, bar.late)


def _put(desc: Descriptor, at: Any, tile: Shared) -> None:
    outer, inner = desc.box(at)
    # what is read late is not overwritten before
    _group.stores.append(lambda: desc.t[outer].copy_(tile.t.view(desc.block)[inner]))


def _stored(left: int) -> None:
    while len(_group.stores) > left:
        _group.stores.pop(0)()


def _multiply(a: Any, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False) -> Product:
    unwrapped(a)
    found = Product(a, b, acc, bool(use_acc))
    _group.products.append(found)
    assert is_async
    return found


def _products(left: int, deps: Any) -> Any:
    while len(_group.products) > left:
        _group.products.pop(0).run()
    found = tuple(Value(x.t) if isinstance(x, Product) and x.done else x for x in deps)
    return found if len(found) > 1 else found[0]


def _finish() -> None:
    assert not any((_group.products, _group.stores, *_group.copies)), "something is in flight at the end"


hopper = SimpleNamespace(
    async_copy=SimpleNamespace(
        async_copy_global_to_shared=_copy_rows, commit_group=lambda: _group.copies.append([]), wait_group=_wait_group
    ),
    mbarrier=SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda bar, count: bar.init(count),
        expect=lambda bar, size, pred=True: bar.arrive(1, size) if pred else None,
        wait=lambda bar, parity, pred=True: bar.wait(int(parity)) if pred else None,
        arrive=lambda bar, count=1, pred=True: bar.arrive(count) if pred else None,
    ),
    tma=SimpleNamespace(
        async_copy_global_to_shared=_fetch, async_copy_shared_to_global=_put, store_wait=_stored
    ),
    fence_async_shared=lambda: None, warpgroup_mma=_multiply, warpgroup_mma_wait=_products,
    warpgroup_mma_init=lambda x: x,
)  # fmt: skip


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda found: found


_stand_ins = SimpleNamespace(
    gluon=SimpleNamespace(jit=_jit), language=language, hopper=hopper, TensorDescriptor=None, cuda=None,
    DEPENDENT=False, tile_layout=None,
)  # fmt: skip
_modules: dict[str, ModuleType] = {}


def _import(name: str, globals_: Any = None, locals_: Any = None, wanted: Any = (), level: int = 0) -> Any:
    if level:
        return load(name) if name not in ("common", "hopper") else _stand_ins
    if name.startswith("triton."):
        return _stand_ins
    return builtins.__import__(name, globals_, locals_, wanted, level)


def load(name: str) -> ModuleType:
    """A module of kernels on the stand-ins."""
    if name not in _modules:
        module = ModuleType(f"emulated.{name}")
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        path = _FOLDER / f"{name}.py"
        source, edit = path.read_text(), EDITS.get(name, ("", ""))
        if edit[0] not in source:
            raise ValueError(f"EDITS: expected words of {path.name}, got {edit[0]!r}")
        exec(compile(source.replace(*edit, 1), str(path), "exec"), vars(module))
        _modules[name] = module
    return _modules[name]


def _pointer(address: Any, tensors: dict[str, torch.Tensor]) -> Pointer:
    if not isinstance(address, tuple):
        return Pointer(address.detach().view(-1))
    name, offset, dtype = address
    return Pointer(tensors[name].view(torch.uint8)[offset:].view(dtype))


def run(launch: Launch, tensors: dict[str, torch.Tensor]) -> None:
    """A start of a kernel; `tensors`: the flat memory of each that the start names."""
    kernel = launch._kernel.fn
    function = getattr(load(kernel.__module__.rpartition(".")[2]), kernel.__name__)
    given: dict[str, Any] = {}
    for name, address in zip(inspect.signature(function).parameters, launch._plain, strict=False):
        if isinstance(address, Mapped):
            how, memory = address._descriptor, _pointer(address.address, tensors).memory
            given[name] = Descriptor(memory, how.shape, how.strides, how.block_shape)
        else:
            given[name] = _pointer(address, tensors)
    for name, value in launch._scalars.items():
        is_map = hasattr(value, "block_shape")
        given[name] = Descriptor(value.base, value.shape, value.strides, value.block_shape) if is_map else value
    given |= launch._constants
    x, y, z = launch._grid
    for k in range(z):
        for j in range(y):
            for i in range(x):
                _group.program = (i, j, k)
                function(**given)
                _finish()
