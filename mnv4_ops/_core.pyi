"""The native library. Addresses are ints (`Tensor.data_ptr()`), strides are in elements, sizes in bytes."""

from collections.abc import Sequence
from typing import Any, TypedDict

class CpuInfo(TypedDict):
    model: str
    features: list[str]
    l1d: int
    l2: int
    l3: int
    tiers: list[str]
    tier: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    tiers: list[str]

def cpu_info() -> CpuInfo: ...
def build_info() -> BuildInfo: ...
def set_tier(name: str) -> None: ...
def openmp_runtime() -> str | None: ...
def fma_peak(threads: int = 1, seconds: float = 0.2) -> float: ...  # GFLOP/s of the tier in force

class Block:
    def __init__(
        self,
        *,
        c_in: int,
        c_mid: int,
        c_out: int,
        start_kernel: int = 0,
        start_stride: int = 1,
        start_act: str = "none",
        expand: bool = False,
        expand_kernel: int = 1,
        expand_stride: int = 1,
        expand_act: str = "none",
        mid_kernel: int = 0,
        mid_stride: int = 1,
        mid_act: str = "none",
        project: bool = False,
        project_act: str = "none",
        residual: bool = False,
        padding: str = "symmetric",
    ) -> None: ...
    def pack(
        self,
        stage: int,
        weight: int,
        bias: int = 0,
        bn_weight: int = 0,
        bn_bias: int = 0,
        bn_mean: int = 0,
        bn_var: int = 0,
        eps: float = 0.0,
        gamma: int = 0,
    ) -> None: ...
    def output_shape(self, n: int, h: int, w: int) -> tuple[int, int, int, int]: ...
    def run(self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, threads: int) -> None: ...
    def scratch_bytes(self, h: int, w: int, threads: int = 1) -> int: ...
    @property
    def packed_bytes(self) -> int: ...
    def export_blob(self) -> bytes: ...
    def import_blob(self, blob: bytes) -> None: ...

class Head:
    def __init__(
        self,
        *,
        c_in: int,
        c_feat: int = 0,
        feat_act: str = "none",
        c_hidden: int = 0,
        hidden_act: str = "none",
        classes: int = 0,
    ) -> None: ...
    def pack(
        self,
        stage: int,
        weight: int,
        bias: int = 0,
        bn_weight: int = 0,
        bn_bias: int = 0,
        bn_mean: int = 0,
        bn_var: int = 0,
        eps: float = 0.0,
        gamma: int = 0,
    ) -> None: ...
    def run(self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, threads: int) -> None: ...
    def output_features(self) -> int: ...
    def scratch_bytes(self, h: int, w: int, threads: int = 1) -> int: ...
    @property
    def packed_bytes(self) -> int: ...
    def export_blob(self) -> bytes: ...
    def import_blob(self, blob: bytes) -> None: ...

class MobileMQA:
    """Stages: 0 norm, 1 query_norm (without a weight), 2 query, 3 key_down, 4 key, 5 value_down, 6 value, 7 output."""

    def __init__(
        self,
        *,
        c: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        kv_kernel: int = 3,
        kv_stride: int = 1,
        query_stride: int = 1,
        norm: bool = True,
        query_norm: bool = False,
        padding: str = "symmetric",
        residual: bool = True,
    ) -> None: ...
    def pack(
        self,
        stage: int,
        weight: int = 0,
        bias: int = 0,
        bn_weight: int = 0,
        bn_bias: int = 0,
        bn_mean: int = 0,
        bn_var: int = 0,
        eps: float = 0.0,
        gamma: int = 0,
    ) -> None: ...
    def output_shape(self, n: int, h: int, w: int) -> tuple[int, int, int, int]: ...
    def run(self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, threads: int) -> None: ...
    def scratch_bytes(self, h: int, w: int, threads: int = 1) -> int: ...
    @property
    def packed_bytes(self) -> int: ...
    def export_blob(self) -> bytes: ...
    def import_blob(self, blob: bytes) -> None: ...

def attention(
    q: int,
    q_strides: Sequence[int],
    k: int,
    k_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    out: int,
    out_strides: Sequence[int],
    n: int,
    heads: int,
    nq: int,
    nk: int,
    key_dim: int,
    value_dim: int,
    scale: float,
    threads: int,
) -> None: ...  # [n, heads, rows, channels], one head of k and v

class Program:
    def __init__(self, ops: list[Block | MobileMQA | Head]) -> None: ...
    def output_shape(self, n: int, h: int, w: int) -> tuple[int, ...]: ...
    def workspace_bytes(self, n: int, h: int, w: int, threads: int = 1) -> int: ...
    def scratch_bytes(self, h: int, w: int, threads: int = 1) -> int: ...
    def run(
        self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, workspace: int, threads: int
    ) -> None: ...
    def forward(
        self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, threads: int
    ) -> None: ...  # run() in a workspace of the calling thread
    def profile(
        self, x: int, n: int, h: int, w: int, strides: Sequence[int], out: int, workspace: int, threads: int
    ) -> list[float]: ...  # runs; seconds by op

WORKSPACE_LIMIT: int  # bytes that a thread keeps at most; more lives for one forward() only

def workspace_kept() -> int: ...  # bytes that the calling thread keeps for forward()

# the same of float16 and of bfloat16, where the machine has their arithmetic: `pack` takes float32, there are no blobs
class HalfBlock(Block): ...
class HalfMobileMQA(MobileMQA): ...
class HalfHead(Head): ...

class HalfProgram(Program):
    def __init__(self, ops: list[HalfBlock | HalfMobileMQA | HalfHead]) -> None: ...

class BFloat16Block(Block): ...
class BFloat16MobileMQA(MobileMQA): ...
class BFloat16Head(Head): ...

class BFloat16Program(Program):
    def __init__(self, ops: list[BFloat16Block | BFloat16MobileMQA | BFloat16Head]) -> None: ...

class Guard:
    """Notices when modules or their tensors are no longer what they were when it was made."""

    STALE: int
    STRUCTURE: int
    TRAINING: int
    HOOKS: int
    OWN_FORWARD: int
    GRAD: int
    def __init__(self, modules: list[Any], attributes: list[Any], tensors: list[Any], aliases: list[Any]) -> None: ...
    def check(self, root: Any, grad: bool) -> int: ...
    def where(self) -> str: ...
    def __len__(self) -> int: ...

def tensor_functions_found() -> bool: ...
def dtype_word_found() -> bool: ...
def fingerprint(tensors: list[Any]) -> tuple[bytes, tuple[bytes, bytes]]: ...
def checksum(arrays: list[tuple[int, int]]) -> int: ...  # (address, elements) of float32 arrays

class Lane:
    """A model's forward in one native call, for inputs like those that went through all checks before."""

    def __init__(self, module: Any, guard: Guard, program: Program, hooks: list[Any]) -> None: ...
    def learn(self, x: Any, shape: tuple[int, ...]) -> bool: ...
    @property
    def call(self) -> Any: ...  # (module, x) -> output, or None: go the long way

def lanes_found() -> bool: ...
def pause_lanes(by: int) -> None: ...
