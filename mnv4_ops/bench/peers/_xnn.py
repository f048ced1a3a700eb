"""XNNPACK's C API through ctypes, from the library inside the executorch wheel. Needs numpy only.

Tensors are NHWC, weights OHWI (depthwise 1HWC), as XNNPACK has them. `Subgraph` builds, `Runtime` runs without copies.
"""

from __future__ import annotations

import ctypes as C
import functools
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_SZ, _U32, _F32, _PTR = C.c_size_t, C.c_uint32, C.c_float, C.c_void_p
_NO_VALUE = 0xFFFFFFFF
_FP32 = 1
_EXTERNAL_INPUT, _EXTERNAL_OUTPUT = 1, 2
_REDUCE_MEAN, _KEEP_DIMS = 2, 64
_TRANSPOSE_B = 1
_ADD, _MULTIPLY = 0, 2
_INF = float("inf")
# kernels may read past the end of an input
_EXTRA_BYTES = 128

_SIGNATURES: dict[str, list[Any]] = {
    "xnn_initialize": [_PTR],
    "xnn_create_subgraph": [_U32, _U32, _PTR],
    "xnn_delete_subgraph": [_PTR],
    "xnn_define_tensor_value": [_PTR, C.c_int, _SZ, _PTR, _PTR, _U32, _U32, _PTR],
    "xnn_define_convolution_2d": [_PTR] + [_U32] * 11 + [_SZ, _SZ, _F32, _F32] + [_U32] * 5,
    "xnn_define_depthwise_convolution_2d": [_PTR] + [_U32] * 11 + [_SZ, _F32, _F32] + [_U32] * 5,
    "xnn_define_fully_connected": [_PTR, _F32, _F32] + [_U32] * 5,
    "xnn_define_binary": [_PTR, C.c_int, _PTR, _U32, _U32, _U32, _U32],
    "xnn_define_gelu": [_PTR, _U32, _U32, _U32],
    "xnn_define_clamp": [_PTR, _F32, _F32, _U32, _U32, _U32],
    "xnn_define_static_reduce": [_PTR, C.c_int, _SZ, _PTR, _U32, _U32, _U32],
    "xnn_define_batch_matrix_multiply": [_PTR, _U32, _U32, _U32, _U32],
    "xnn_define_softmax": [_PTR, _U32, _U32, _U32],
    "xnn_define_static_reshape": [_PTR, _SZ, _PTR, _U32, _U32, _U32],
    "xnn_create_runtime_v2": [_PTR, _PTR, _U32, _PTR],
    "xnn_reshape_runtime": [_PTR],
    "xnn_setup_runtime_v2": [_PTR, _SZ, _PTR],
    "xnn_invoke_runtime": [_PTR],
    "xnn_delete_runtime": [_PTR],
}

Shape = tuple[int, ...]
Pads = tuple[int, int, int, int]


class _External(C.Structure):
    _fields_ = [("id", _U32), ("data", _PTR)]


def library_folder() -> Path | None:
    """Folder of the shared libraries in the installed executorch wheel, or None."""
    found = importlib.util.find_spec("executorch")
    for root in (found.submodule_search_locations or []) if found else []:
        folder = Path(root) / "lib"
        if (folder / "libexecutorch_backend_xnnpack.so").exists():
            return folder
    return None


@functools.cache
def _load() -> tuple[C.CDLL, C.CDLL]:
    folder = library_folder()
    if folder is None:
        raise OSError("libexecutorch_backend_xnnpack.so is not there")
    library = C.CDLL(str(folder / "libexecutorch_backend_xnnpack.so"))
    pools = C.CDLL(str(folder / "libexecutorch_threadpool.so"))
    pools.pthreadpool_create.restype, pools.pthreadpool_create.argtypes = _PTR, [_SZ]
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    _check(library.xnn_initialize(None), "xnn_initialize")
    return library, pools


@functools.cache
def _pool(threads: int) -> int | None:
    # one for all runtimes; without a pool XNNPACK runs on the calling thread
    return _load()[1].pthreadpool_create(threads) if threads > 1 else None


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"XNNPACK: {what} returned status {status}")


def _padded(array: np.ndarray) -> np.ndarray:
    """64-byte aligned copy with slack behind it."""
    array = np.ascontiguousarray(array, np.float32)
    buffer = np.zeros(array.nbytes + _EXTRA_BYTES + 64, np.uint8)
    offset = -buffer.ctypes.data % 64
    result = buffer[offset : offset + array.nbytes].view(np.float32).reshape(array.shape)
    result[...] = array
    return result


class Subgraph:
    """An XNNPACK graph with inputs (external values 0, 2, 3, ...) and one output (external value 1). Values are ids
    with a shape.
    """

    def __init__(self, inputs: int = 1) -> None:
        self.library, _ = _load()
        self.handle = _PTR()
        self.shapes: dict[int, Shape] = {}
        self._arrays: list[np.ndarray] = []
        _check(self.library.xnn_create_subgraph(1 + inputs, 0, C.byref(self.handle)), "xnn_create_subgraph")
        weakref.finalize(self, self.library.xnn_delete_subgraph, self.handle)

    def _value(self, shape: Shape, data: np.ndarray | None = None, external: int = _NO_VALUE, flags: int = 0) -> int:
        address = None
        if data is not None:
            data = _padded(data)
            self._arrays.append(data)
            address = data.ctypes.data
        value = _U32()
        dims = (_SZ * len(shape))(*shape)
        status = self.library.xnn_define_tensor_value(
            self.handle, _FP32, len(shape), dims, address, external, flags, C.byref(value)
        )
        _check(status, "xnn_define_tensor_value")
        self.shapes[value.value] = tuple(shape)
        return value.value

    def input(self, shape: Shape, index: int = 0) -> int:
        return self._value(shape, external=index + 1 if index else 0, flags=_EXTERNAL_INPUT)

    def _result(self, shape: Shape, last: bool) -> int:
        return self._value(shape, external=1, flags=_EXTERNAL_OUTPUT) if last else self._value(shape)

    def _constant(self, array: np.ndarray | None) -> int:
        return _NO_VALUE if array is None else self._value(array.shape, array)

    def convolution(
        self,
        x: int,
        weight: np.ndarray,
        bias: np.ndarray | None,
        *,
        stride: int,
        pads: Pads,
        depthwise: bool,
        clamp: tuple[float, float] = (-_INF, _INF),
        last: bool = False,
    ) -> int:
        """weight [O, kh, kw, I], depthwise [1, kh, kw, C]; pads top, right, bottom, left."""
        n, h, w, c_in = self.shapes[x]
        _, kh, kw, c_last = weight.shape
        c_out = c_last if depthwise else weight.shape[0]
        top, right, bottom, left = pads
        y = self._result((n, (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1, c_out), last)
        geometry = (self.handle, top, right, bottom, left, kh, kw, stride, stride, 1, 1, 1)
        operands = (*clamp, x, self._constant(weight), self._constant(bias), y, 0)
        if depthwise:
            _check(
                self.library.xnn_define_depthwise_convolution_2d(*geometry, c_in, *operands), "depthwise_convolution_2d"
            )
        else:
            _check(self.library.xnn_define_convolution_2d(*geometry, c_in, c_out, *operands), "convolution_2d")
        return y

    def linear(self, x: int, weight: np.ndarray, bias: np.ndarray | None, *, last: bool = False) -> int:
        """weight [O, I]."""
        y = self._result((*self.shapes[x][:-1], weight.shape[0]), last)
        operands = (x, self._constant(weight), self._constant(bias), y, 0)
        _check(self.library.xnn_define_fully_connected(self.handle, -_INF, _INF, *operands), "fully_connected")
        return y

    def add(self, a: int, b: int, *, last: bool = False) -> int:
        y = self._result(self.shapes[a], last)
        _check(self.library.xnn_define_binary(self.handle, _ADD, None, a, b, y, 0), "add")
        return y

    def multiply(self, a: int, constant: np.ndarray, *, last: bool = False) -> int:
        y = self._result(self.shapes[a], last)
        _check(
            self.library.xnn_define_binary(self.handle, _MULTIPLY, None, a, self._constant(constant), y, 0), "multiply"
        )
        return y

    def add_constant(self, a: int, constant: np.ndarray) -> int:
        return self._binary(_ADD, a, self._constant(constant))

    def matmul(self, a: int, b: int, *, transpose_b: bool = False, last: bool = False) -> int:
        """[n, m, k] x [n, k, l] (or [n, l, k]) -> [n, m, l]."""
        n, m, _ = self.shapes[a]
        y = self._result((n, m, self.shapes[b][1 if transpose_b else 2]), last)
        flags = _TRANSPOSE_B if transpose_b else 0
        _check(self.library.xnn_define_batch_matrix_multiply(self.handle, a, b, y, flags), "batch_matrix_multiply")
        return y

    def softmax(self, x: int) -> int:
        """Over the last dimension."""
        y = self._result(self.shapes[x], False)
        _check(self.library.xnn_define_softmax(self.handle, x, y, 0), "softmax")
        return y

    def _binary(self, kind: int, a: int, b: int) -> int:
        y = self._result(self.shapes[a], False)
        _check(self.library.xnn_define_binary(self.handle, kind, None, a, b, y, 0), "binary")
        return y

    def clamp(self, x: int, low: float, high: float, *, last: bool = False) -> int:
        y = self._result(self.shapes[x], last)
        _check(self.library.xnn_define_clamp(self.handle, low, high, x, y, 0), "clamp")
        return y

    def gelu(self, x: int, *, last: bool = False) -> int:
        y = self._result(self.shapes[x], last)
        _check(self.library.xnn_define_gelu(self.handle, x, y, 0), "gelu")
        return y

    def mean_hw(self, x: int, *, last: bool = False) -> int:
        n, _, _, c = self.shapes[x]
        y = self._result((n, 1, 1, c), last)
        axes = (_SZ * 2)(1, 2)
        _check(self.library.xnn_define_static_reduce(self.handle, _REDUCE_MEAN, 2, axes, x, y, _KEEP_DIMS), "mean")
        return y

    def reshape(self, x: int, shape: Shape, *, last: bool = False) -> int:
        y = self._result(shape, last)
        dims = (_SZ * len(shape))(*shape)
        _check(self.library.xnn_define_static_reshape(self.handle, len(shape), dims, x, y, 0), "reshape")
        return y


class Runtime:
    """A subgraph made ready: `invoke()` computes `output` from `inputs` (numpy arrays, NHWC, read and written in
    place).
    """

    def __init__(self, graph: Subgraph, inputs: list[np.ndarray], output_shape: Shape, threads: int) -> None:
        self.graph = graph
        self.inputs, self.output = [_padded(x) for x in inputs], _padded(np.zeros(output_shape, np.float32))
        library = graph.library
        self._handle = _PTR()
        _check(
            library.xnn_create_runtime_v2(graph.handle, _pool(threads), 0, C.byref(self._handle)),
            "xnn_create_runtime_v2",
        )
        weakref.finalize(self, library.xnn_delete_runtime, self._handle)
        _check(library.xnn_reshape_runtime(self._handle), "xnn_reshape_runtime")
        arrays = [self.inputs[0], self.output, *self.inputs[1:]]
        external = (_External * len(arrays))(*(_External(i, array.ctypes.data) for i, array in enumerate(arrays)))
        _check(library.xnn_setup_runtime_v2(self._handle, len(arrays), external), "xnn_setup_runtime_v2")
        self._invoke = library.xnn_invoke_runtime

    def invoke(self) -> None:
        status = self._invoke(self._handle)
        if status:
            _check(status, "xnn_invoke_runtime")
