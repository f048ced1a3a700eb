"""CUDA graphs of whole models, for `enable(..., cuda_graphs=True)`.

The wrapper of `MobileNetV3.forward` and `forward_features` (and of the reference model's) checks the weights as always;
then, instead of starting the kernels one by one, it copies the input into the graph's own, replays, and returns a copy
of the graph's output. A graph reads the packed weights, which are filled again in place, so it stays right when weights
change. It is made by the first call with an input shape, strides, dtype, device and fp32 precision, after two runs on a
side stream; at most `KEPT` graphs are kept on a device, in one memory pool, and the one that was not used for longest
goes first.

The kernels run one by one instead: for an empty batch, inside a capture of the caller's, in `explain`, where a part of
the model has no kernel, and where capturing has failed (said once in a warning). The original forward runs under the
same conditions as without graphs: hooks inside, autocast, grad, training; compiled code holds ops and no graphs.
`disable()`, `repack()` and the end of a model drop its graphs.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnv4_ops.ops import cuda

METHODS = ("forward", "forward_features")
KEPT = 16
_WARM_UP = 2


class _Choice:
    """Which models use graphs."""

    everything = False
    ids: frozenset[int] = frozenset()


_choice = _Choice()


def wanted(module: nn.Module) -> bool:
    return _choice.everything or id(module) in _choice.ids


def choose(everything: bool, ids: Iterable[int]) -> None:
    """Sets for which models graphs are used, and drops those of the others."""
    before = _choice.everything, _choice.ids
    _choice.everything, _choice.ids = everything, frozenset(ids)
    if before != (everything, _choice.ids) and not everything:
        for pool in list(_pools.values()):
            pool.drop(lambda module: id(module) not in _choice.ids)


def drop(modules: Iterable[nn.Module] | None = None) -> None:
    """Drops the graphs of some modules, or all."""
    wanted = None if modules is None else {id(module) for module in modules}
    for pool in list(_pools.values()):
        pool.drop(lambda module: wanted is None or id(module) in wanted)


def count() -> int:
    """Graphs that are kept now, on all devices."""
    return sum(len(pool) for pool in list(_pools.values()))


@dataclass(eq=False)
class _Recording:
    """A captured graph with its own input and output; `graph` is None where capturing failed."""

    module: weakref.ref[nn.Module]
    program: Any
    x: Tensor | None = None
    out: Tensor | None = None
    graph: Any = None
    stream: Any = None  # that `x` was last used on


class _Device:
    """What is asked of the GPU, in one place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.done = torch.cuda.Event()
        self.last: Any = None

    def empty(self) -> None:
        """No graph is left: a pool that nothing uses any more cannot be used again."""
        self.pool = None

    def begin(self) -> Any:
        """The current stream, ordered behind the last use of the pool."""
        stream = torch.cuda.current_stream(self.device)
        if self.last is not None and self.last != stream:
            stream.wait_event(self.done)
        self.last = stream
        return stream

    def end(self, stream: Any) -> None:
        self.done.record(stream)

    def capture(self, program: Any, x: Tensor) -> tuple[Any, Tensor]:
        """(graph, output) of program.run(x) after a warm-up, on a side stream."""
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                program.run(x)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        # other threads may allocate meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            out = program.run(x)
        return graph, out


@dataclass(eq=False)
class _Pool:
    """The graphs of one device. They share memory, so one runs at a time: the lock orders their starts, events their
    work.
    """

    device: Any
    lock: Any = field(default_factory=threading.Lock)
    recordings: OrderedDict[Any, _Recording] = field(default_factory=OrderedDict)
    dead: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        with self.lock:
            self._bury()
            return sum(recording.graph is not None for recording in self.recordings.values())

    def drop(self, unwanted: Any) -> None:
        with self.lock:
            self._bury()
            for key, recording in list(self.recordings.items()):
                module = recording.module()
                if module is None or unwanted(module):
                    del self.recordings[key]

    def _gone(self, key: Any) -> Any:
        def gone(ref: Any) -> None:
            self.dead.append((key, ref))
            # the collector may strike while this very thread holds the lock: then the next use cleans up
            if self.lock.acquire(blocking=False):
                try:
                    self._bury()
                finally:
                    self.lock.release()

        return gone

    def _bury(self) -> None:
        while self.dead:
            key, ref = self.dead.pop()
            recording = self.recordings.get(key)
            if recording is not None and recording.module is ref:
                del self.recordings[key]

    def run(self, module: nn.Module, method: str, program: Any, x: Tensor) -> Tensor | None:
        tf32 = cuda.precision() if x.dtype is torch.float32 else 0
        key = (id(module), method, x.shape, x.stride(), x.dtype, tf32)
        with self.lock, cuda.on_device(x.device):
            self._bury()
            recording = self.recordings.get(key)
            if recording is not None and not self._stands(recording, module, program):
                del self.recordings[key]
                recording = None
            if recording is None:
                recording = self._record(key, module, program, x)
            else:
                self.recordings.move_to_end(key)
            return None if recording.graph is None else self._replay(recording, x)

    @staticmethod
    def _stands(recording: _Recording, module: nn.Module, program: Any) -> bool:
        if recording.module() is not module:
            return False
        if recording.program is not program:
            # packed again: the same blocks have the same memory
            if recording.program.natives != program.natives:
                return False
            recording.program = program
        return True

    def _record(self, key: Any, module: nn.Module, program: Any, x: Tensor) -> _Recording:
        recording = _Recording(weakref.ref(module, self._gone(key)), program)
        # normal tensors, which every later call may write to
        with torch.inference_mode(False), torch.no_grad():
            stream = self.device.begin()
            try:
                # the graph that goes makes room for the one that comes
                while len(self.recordings) >= KEPT:
                    self.recordings.popitem(last=False)
                if all(other.graph is None for other in self.recordings.values()):
                    self.device.empty()
                recording.x = torch.empty_like(x)
                recording.x.copy_(x)
                recording.graph, recording.out = self.device.capture(program, recording.x)
            except cuda.NoFit:
                raise
            except RuntimeError as error:
                recording.graph = recording.x = recording.out = None
                line = str(error).strip().splitlines()
                warnings.warn(
                    f"mnv4_ops: a forward could not be captured into a CUDA graph and runs without one: "
                    f"{line[0] if line else type(error).__name__}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self.device.end(stream)
        recording.stream = stream
        self.recordings[key] = recording
        return recording

    def _replay(self, recording: _Recording, x: Tensor) -> Tensor:
        assert recording.x is not None
        assert recording.out is not None
        stream = self.device.begin()
        if recording.stream != stream:
            recording.stream = stream
            if stream is not None:
                # its memory is not given away before this stream is through with it
                recording.x.record_stream(stream)
        recording.x.copy_(x)
        recording.graph.replay()
        out = recording.out.clone()
        self.device.end(stream)
        return out


_pools: dict[torch.device, _Pool] = {}
_pools_lock = threading.Lock()
_open: Any = _Device


def _pool(device: torch.device) -> _Pool:
    pool = _pools.get(device)
    if pool is None:
        with _pools_lock:
            pool = _pools.get(device)
            if pool is None:
                pool = _pools[device] = _Pool(_open(device))
    return pool


def _usable(x: Tensor) -> bool:
    return x.is_cuda and x.shape[0] > 0 and not torch.cuda.is_current_stream_capturing()


def run(module: nn.Module, method: str, program: Any, x: Tensor) -> Tensor:
    """`program.run(x)`, through a graph where one is for this call. The output is a tensor of its own."""
    out = _pool(x.device).run(module, method, program, x) if _usable(x) else None
    return program.run(x) if out is None else out
