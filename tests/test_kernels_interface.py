"""The native library on bad arguments, and packed blobs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import STRUCTURES, TestBlock, assert_same_bits, core, run, structure

import mnv4_ops
from mnv4_ops import _native, check
from mnv4_ops.spec import HeadSpec

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

IB = {"c_in": 16, "c_mid": 32, "c_out": 16, "expand": True, "mid_kernel": 3, "project": True}
# magic, version, op, dtype, tile, ISA, floats, description
HEADER = struct.Struct("=8s4I16sQ16i")


def _ib() -> Any:
    torch.manual_seed(0)
    return TestBlock.random(**IB).native()


def _head(seed: int = 0) -> Any:
    spec = HeadSpec(16, 24, 40, 10)
    return check.native_block(spec, check.random_module(spec, seed).params())


def _raises(call: Callable[[], Any], *parts: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


BLOCKS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"c_in": 0}, ("c_in = 0", "expected 1 to")),
    ({"c_mid": -4}, ("c_mid = -4", "expected 1 to")),
    ({"c_out": 1 << 21}, ("c_out = 2097152", "expected 1 to")),
    ({"start_kernel": 7}, ("start_kernel = 7", "0, 3 or 5")),
    ({"start_kernel": -3}, ("start_kernel = -3", "0, 3 or 5")),
    ({"mid_kernel": 4}, ("mid_kernel = 4", "0, 3 or 5")),
    ({"expand_kernel": 2, "mid_kernel": 0}, ("expand_kernel = 2", "1, 3 or 5")),
    ({"start_kernel": 3, "start_stride": 3}, ("start_stride = 3", "1 or 2")),
    ({"start_stride": 2}, ("start_stride = 2", "1 without a start depthwise")),
    ({"mid_stride": 0}, ("mid_stride = 0", "1 or 2")),
    ({"mid_kernel": 0, "mid_stride": 2}, ("mid_stride = 2", "1 without a mid depthwise")),
    ({"expand_stride": 2}, ("expand_stride = 2", "1 for a 1x1 expand")),
    ({"expand_stride": -1}, ("expand_stride = -1", "1 or 2")),
    ({"expand": False, "mid_kernel": 0}, ("c_mid = 32", "c_in without an expand stage")),
    ({"expand": False, "c_mid": 16}, ("mid_kernel = 3", "0 without an expand stage")),
    ({"project": False}, ("c_out = 16", "c_mid without a project stage")),
    ({"project": False, "c_out": 32}, ("mid_kernel = 3", "0 without a project stage")),
    ({"expand": False, "project": False, "mid_kernel": 0, "c_mid": 16}, ("no stage given",)),
    ({"start_kernel": 3, "expand_kernel": 3, "mid_kernel": 0}, ("expand_kernel = 3", "1 after a start depthwise")),
    ({"expand_kernel": 3}, ("mid_kernel = 3", "0 after a dense expand")),
    ({"residual": True, "mid_stride": 2}, ("residual = 1", "strides are 1")),
    ({"residual": True, "c_out": 24}, ("residual = 1", "c_in == c_out")),
    ({"padding": "valid"}, ("padding = 'valid'", "symmetric or same")),
    ({"expand_act": "silu"}, ("expand_act = 'silu'", "none, relu, relu6 or gelu")),
    ({"start_act": "RELU"}, ("start_act = 'RELU'", "none, relu, relu6 or gelu")),
    ({"mid_act": ""}, ("mid_act = ''", "none, relu, relu6 or gelu")),
    ({"project_act": "swish"}, ("project_act = 'swish'", "none, relu, relu6 or gelu")),
]


@pytest.mark.parametrize(("change", "parts"), BLOCKS, ids=lambda v: "-".join(map(str, v)))
def test_bad_blocks(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    _raises(lambda: core().Block(**(IB | change)), "Block", *parts)


@pytest.mark.parametrize("change", [{"c_in": "16"}, {"c_in": 1.5}, {"c_in": None}, {"act": "relu"}, {"c_in": 1 << 40}])
def test_blocks_of_wrong_types(change: dict[str, Any]) -> None:
    _raises(lambda: core().Block(**(IB | change)), error=TypeError)


HEADS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"c_in": 0}, ("c_in = 0", "at least 1")),
    ({"c_feat": -1}, ("c_feat = -1", "at least 0")),
    ({"c_hidden": -1}, ("c_hidden = -1", "at least 0")),
    ({"classes": -5}, ("classes = -5", "at least 0")),
    ({"feat_act": "x"}, ("feat_act = 'x'", "relu6")),
    ({"hidden_act": "x"}, ("hidden_act = 'x'", "relu6")),
]


@pytest.mark.parametrize(("change", "parts"), HEADS, ids=lambda v: "-".join(map(str, v)))
def test_bad_heads(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    _raises(lambda: core().Head(**({"c_in": 16, "c_feat": 24} | change)), "Head", *parts)


PACKS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"stage": 0}, ("stage = 0", "expected a stage that the block has")),
    ({"stage": 4}, ("stage = 4", "expected a stage that the block has")),
    ({"stage": -1}, ("stage = -1", "expected a stage that the block has")),
    ({"weight": 0}, ("weight = 0", "address")),
    ({"bn_mean": 64}, ("bn_mean and bn_var together",)),
    ({"bn_var": 64}, ("bn_mean and bn_var together",)),
    ({"bn_weight": 64}, ("bn_weight or bn_bias without bn_mean and bn_var",)),
    ({"bn_bias": 64}, ("bn_weight or bn_bias without bn_mean and bn_var",)),
    ({"eps": -1e-3}, ("eps = -0.001", "at least 0")),
    ({"eps": float("nan")}, ("eps = nan", "at least 0")),
]


@pytest.mark.parametrize(("change", "parts"), PACKS, ids=lambda v: "-".join(map(str, v)))
def test_bad_packs(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    # addresses that nothing may read
    _raises(lambda: core().Block(**IB).pack(**({"stage": 1, "weight": 64} | change)), "pack", *parts)


def test_bad_packs_of_heads() -> None:
    for stage in (-1, 1, 3):
        _raises(lambda at=stage: core().Head(c_in=16, c_feat=24).pack(at, 64), "Head.pack", f"stage = {stage}")


RUNS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"n": -1}, ("n = -1", "at least 0")),
    ({"h": 0}, ("h = 0", "at least 1")),
    ({"w": -5}, ("w = -5", "at least 1")),
    ({"threads": 0}, ("threads = 0", "at least 1")),
    ({"threads": -2}, ("threads = -2", "at least 1")),
    ({"x": 0}, ("x or out is 0", "address")),
    ({"out": 0}, ("x or out is 0", "address")),
]


@pytest.mark.parametrize("kind", ["block", "head", "program", "forward", "profile"])
@pytest.mark.parametrize(("change", "parts"), RUNS, ids=lambda v: "-".join(map(str, v)))
def test_bad_runs(kind: str, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    # x and out are addresses that nothing may touch
    arguments = {"x": 64, "n": 1, "h": 5, "w": 5, "strides": (400, 25, 5, 1), "out": 64, "threads": 1} | change
    if kind in ("program", "profile"):
        program = core().Program([_ib(), _head()])
        call = program.run if kind == "program" else program.profile
        _raises(lambda: call(**arguments, workspace=64), "run", *parts)
    elif kind == "forward":
        _raises(lambda: core().Program([_ib(), _head()]).forward(**arguments), "run", *parts)
    else:
        native = _ib() if kind == "block" else _head()
        _raises(lambda: native.run(**arguments), "run", *parts)


def test_runs_before_all_stages_are_packed() -> None:
    block = core().Block(**IB)
    weight = torch.randn(32, 16)
    block.pack(1, weight.data_ptr())
    for native in (block, core().Program([block]), core().Head(c_in=16, c_feat=24)):
        more = (64,) if isinstance(native, core().Program) else ()
        _raises(
            lambda at=native, more=more: at.run(64, 1, 5, 5, (400, 25, 5, 1), 64, *more, 1),
            "packed",
            error=RuntimeError,
        )
    forward = core().Program([block]).forward
    _raises(lambda: forward(64, 1, 5, 5, (400, 25, 5, 1), 64, 1), "packed", error=RuntimeError)
    _raises(block.export_blob, "packed", error=RuntimeError)


def test_strides_of_the_wrong_length() -> None:
    for strides in ((25, 5, 1), (1, 400, 25, 5, 1), None, ("a", "b", "c", "d")):
        _raises(lambda s=strides: _ib().run(64, 1, 5, 5, s, 64, 1), error=TypeError)


def test_bad_programs() -> None:
    program = core().Program
    _raises(lambda: program([]), "empty", "at least one")
    _raises(lambda: program([_head(), _ib()]), "ops[0] is a Head", "last")
    other = core().Block(c_in=24, c_mid=24, c_out=24, start_kernel=3)
    _raises(lambda: program([_ib(), other]), "ops[1] takes 24 channels", "16")
    _raises(lambda: program([_ib(), "block"]), "str", "MobileMQA or Head")
    _raises(lambda: program(None), error=TypeError)
    two = program([_ib(), _ib()])
    _raises(lambda: two.run(64, 1, 5, 5, (400, 25, 5, 1), 64, 0, 1), "workspace = 0", "workspace_bytes")


def test_a_program_keeps_its_blocks() -> None:
    program = core().Program([_ib(), _head()])
    x = torch.randn(2, 16, 5, 5)
    assert_same_bits(run(program, x), run(core().Program([_ib(), _head()]), x))


SHAPES: list[tuple[str, tuple[int, ...]]] = [
    ("output_shape", (-1, 5, 5)),
    ("output_shape", (1, 0, 5)),
    ("output_shape", (1, 5, -1)),
    ("scratch_bytes", (0, 5, 1)),
    ("scratch_bytes", (5, -1, 1)),
    ("workspace_bytes", (-1, 5, 5, 1)),
    ("workspace_bytes", (1, 5, 0, 1)),
]


@pytest.mark.parametrize("kind", ["block", "head", "program"])
@pytest.mark.parametrize(("name", "arguments"), SHAPES, ids=str)
def test_bad_sizes_of_queries(kind: str, name: str, arguments: tuple[int, ...]) -> None:
    native = {"block": _ib, "head": _head, "program": lambda: core().Program([_ib(), _ib()])}[kind]()
    if not hasattr(native, name):
        pytest.skip(f"{kind} has no {name}")
    _raises(lambda: getattr(native, name)(*arguments), "expected at least")


# in a process of their own, since they ended it once; no torch in there
FATAL = {
    "profile without a workspace": "core.Program([block, block]).profile(x, 1, 2, 2, (64, 1, 32, 16), x, 0, 1)",
    "head for no thread": "core.Head(c_in=16, c_feat=24).scratch_bytes(5, 5, 0)",
    "block for no thread": "block.scratch_bytes(5, 5, 0)",
    "program for no thread": "core.Program([block]).scratch_bytes(5, 5, 0)",
}
PROBE = """
import array
from mnv4_ops._native import core
block = core.Block(c_in=16, c_mid=16, c_out=16, expand=True)
memory = array.array("f", [0.0] * 4096)
x = memory.buffer_info()[0]
block.pack(1, x)
try:
    %s
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("name", FATAL)
def test_bad_arguments_that_were_fatal(name: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(mnv4_ops.__file__).parent.parent)}
    command = [sys.executable, "-c", PROBE % FATAL[name]]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert ("workspace = 0" if "profile" in name else "threads = 0") in done.stdout


def test_bad_tier_and_peak() -> None:
    _raises(lambda: core().set_tier("sse9"), "'sse9'", *core().cpu_info()["tiers"])
    _raises(lambda: core().fma_peak(0), "threads = 0", "at least 1")
    assert core().fma_peak(1, 0.01) > 0


@pytest.mark.parametrize("name", STRUCTURES)
def test_blobs_give_the_same_bits(name: str, tier: str) -> None:
    desc = structure(name, "gelu")
    block, twin = TestBlock.random(**desc).native(), core().Block(**desc)
    blob = block.export_blob()
    assert len(blob) == HEADER.size + block.packed_bytes
    twin.import_blob(blob)
    x = torch.randn(2, desc["c_in"], 9, 8)
    assert_same_bits(run(twin, x), run(block, x))
    assert twin.export_blob() == blob


def test_blobs_of_heads() -> None:
    head, twin = _head(), core().Head(c_in=16, c_feat=24, feat_act="relu", c_hidden=40, hidden_act="relu", classes=10)
    twin.import_blob(head.export_blob())
    x = torch.randn(3, 16, 5, 4)
    assert_same_bits(run(twin, x), run(head, x))


def test_a_blob_packed_in_one_tier_serves_in_all() -> None:
    with check.forced_tier():
        blobs = set()
        for tier in core().cpu_info()["tiers"]:
            core().set_tier(tier)
            blobs.add(_ib().export_blob())
        assert len(blobs) == 1


def _changed(blob: bytes, **fields: Any) -> bytes:
    names = ("magic", "version", "op", "dtype", "tile", "isa", "floats")
    values = list(HEADER.unpack_from(blob))
    for name, value in fields.items():
        values[names.index(name)] = value
    return HEADER.pack(*values) + blob[HEADER.size :]


REFUSED: list[tuple[str, Callable[[bytes], bytes], tuple[str, ...]]] = [
    ("magic", lambda b: b"x" + b[1:], ("magic", "mnv4pack")),
    ("version", lambda b: _changed(b, version=2), ("version 2", "expected 1")),
    ("op", lambda b: _changed(b, op=2), ("op kind 2", "expected 1")),
    ("dtype", lambda b: _changed(b, dtype=3), ("dtype 3", "float32")),
    ("isa", lambda b: _changed(b, isa=b"sve"), ("ISA 'sve'", "'any'")),
    ("tile", lambda b: _changed(b, tile=8), ("tile 8", "expected 16")),
    ("floats", lambda b: _changed(b, floats=1 << 60), ("bytes", "expected")),
    ("longer", lambda b: b + b"\0", ("bytes", "expected")),
    ("shorter", lambda b: b[:-4], ("bytes", "expected")),
    ("header only", lambda b: b[: HEADER.size], ("bytes", "expected")),
    ("half a header", lambda b: b[:50], ("50 bytes", f"at least {HEADER.size}")),
    ("empty", lambda b: b"", ("0 bytes", "expected at least")),
]


@pytest.mark.parametrize(("name", "change", "parts"), REFUSED, ids=[row[0] for row in REFUSED])
def test_bad_blobs(name: str, change: Callable[[bytes], bytes], parts: tuple[str, ...]) -> None:
    """Refused by name, and the block keeps what it had."""
    block = _ib()
    x = torch.randn(1, 16, 5, 5)
    before = run(block, x)
    _raises(lambda: block.import_blob(change(block.export_blob())), "import_blob", *parts)
    assert_same_bits(run(block, x), before)


GEOMETRIES = [
    {"c_in": 17}, {"c_mid": 33}, {"c_out": 15}, {"mid_kernel": 5}, {"mid_stride": 2}, {"residual": True},
    {"padding": "same"},
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="waits for Linux: version scripts are the linker's there")
def test_libraries_show_no_symbol_but_their_own() -> None:
    """Parts of a libstdc++ that a toolchain links in would take the place of the process's own."""
    nm = shutil.which("nm")
    assert nm is not None, "the compiler's binutils"
    core_file = Path(core().__file__)
    for file, symbol in ((core_file, "PyInit__core"), (core_file.with_name("libmnv4_ops_torch.so"), "mnv4_ops_repack")):
        done = subprocess.run([nm, "-D", "--defined-only", str(file)], capture_output=True, text=True, check=True)
        assert [line.split()[-1] for line in done.stdout.splitlines()] == [symbol]


@pytest.mark.parametrize("change", GEOMETRIES, ids=str)
def test_blobs_of_another_geometry(change: dict[str, Any]) -> None:
    other = core().Block(**(IB | change))
    _raises(lambda: other.import_blob(_ib().export_blob()), "import_blob", "geometry")
    _raises(other.export_blob, "packed", error=RuntimeError)


def test_blobs_of_another_op() -> None:
    _raises(lambda: _head().import_blob(_ib().export_blob()), "op kind 1", "expected 2")
    _raises(lambda: _ib().import_blob(_head().export_blob()), "op kind 2", "expected 1")
    for blob in ("text", None, 3):
        _raises(lambda blob=blob: _ib().import_blob(blob), error=TypeError)


def test_packing_again_refills_in_place() -> None:
    torch.manual_seed(1)
    first, second = TestBlock.random(**IB), TestBlock.random(**IB)
    native, x = first.native(), torch.randn(1, 16, 5, 5)
    program = core().Program([native])
    before = run(program, x)
    native.import_blob(second.native().export_blob())
    assert_same_bits(run(program, x), run(second.native(), x))
    native.import_blob(first.native().export_blob())
    assert_same_bits(run(program, x), before)
