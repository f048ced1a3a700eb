"""Threads and batch change no bit; two Python threads at once; the GIL; the OpenMP runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_helpers import (
    NAN,
    STRUCTURES,
    THREADS,
    TestBlock,
    assert_same_bits,
    core,
    ib,
    model_program,
    nan_output,
    run,
    structure,
)

import mnv4_ops
from mnv4_ops import _native, check
from mnv4_ops.spec import HeadSpec, Spec, ledger

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

# by kind the largest image of a middling model, so that bands, rings and shared rows occur
LARGEST: dict[str, check.Case] = {}
for _case in check.cases():
    if _case.batch == 1 and _case.where.startswith(("conv_small", "conv_medium", "conv_large")):
        _before = LARGEST.get(_case.spec.kind)
        if _before is None or _case.spec.macs(_case.height, _case.width) > _before.spec.macs(
            _before.height, _before.width
        ):
            LARGEST[_case.spec.kind] = _case


def built(spec: Spec, seed: int = 0) -> Any:
    return check.native_block(spec, check.random_module(spec, seed).params())


@pytest.mark.parametrize("name", STRUCTURES)
def test_threads_change_no_bit_on_small_odd_images(name: str, tier: str) -> None:
    block = TestBlock.random(**structure(name, "gelu")).native()
    for shape in ((1, 13, 11), (1, 1, 1), (3, 2, 40), (5, 9, 7)):
        x = torch.randn(shape[0], STRUCTURES[name]["c_in"], *shape[1:])
        one = run(block, x, 1)
        for threads in THREADS[1:]:
            assert_same_bits(run(block, x, threads), one)


@pytest.mark.parametrize("kind", LARGEST)
def test_threads_change_no_bit_on_large_images(kind: str, tier: str) -> None:
    case = LARGEST[kind]
    block = built(case.spec)
    x = torch.randn(1, case.spec.channels[0], case.height, case.width)
    one = run(block, x, 1)
    for threads in THREADS[1:]:
        assert_same_bits(run(block, x, threads), one)


def test_threads_change_no_bit_of_any_block_of_conv_small(tier: str) -> None:
    for case in check.cases():
        if case.where.startswith("conv_small"):
            block = built(case.spec)
            x = torch.randn(case.batch, case.spec.channels[0], case.height, case.width)
            one = run(block, x, 1)
            for threads in THREADS[1:]:
                assert_same_bits(run(block, x, threads), one)


@pytest.mark.parametrize("name", STRUCTURES)
def test_equal_images_give_equal_rows(name: str, tier: str) -> None:
    block = TestBlock.random(**structure(name, "gelu")).native()
    image = torch.randn(1, STRUCTURES[name]["c_in"], 14, 9)
    alone = run(block, image, 1)
    for batch in (2, 3, 5):
        for threads in THREADS:
            out = run(block, image.repeat(batch, 1, 1, 1), threads)
            for row in out.split(1):
                assert_same_bits(row, alone)


@pytest.mark.parametrize("spec", [LARGEST["Head"].spec, HeadSpec(40, 96, 72, 37)], ids=["largest", "small"])
def test_equal_images_give_equal_rows_of_a_head(spec: Spec, tier: str) -> None:
    head = built(spec)
    image = torch.randn(1, spec.channels[0], 5, 7)
    alone = run(head, image, 1)
    # 16 images are pooled at once
    for batch in (2, 17, 33):
        for threads in THREADS:
            for row in run(head, image.repeat(batch, 1, 1, 1), threads).split(1):
                assert_same_bits(row, alone)


@pytest.mark.parametrize("size", [(224, 224), (97, 65)])
def test_conv_small_as_one_program(size: tuple[int, int], tier: str) -> None:
    program, _ = model_program("conv_small")
    image = torch.randn(1, 3, *size)
    alone = run(program, image, 1)
    for threads in THREADS[1:]:
        assert_same_bits(run(program, image, threads), alone)
    for batch, threads in ((3, 1), (3, 2), (2, 4), (5, 3)):
        for row in run(program, image.repeat(batch, 1, 1, 1), threads).split(1):
            assert_same_bits(row, alone)


@pytest.mark.parametrize(("side", "threads"), [(32, 16), (64, 40), (224, 64)])
def test_less_than_two_rows_a_thread(side: int, threads: int, tier: str) -> None:
    """As many cores as servers have: the stem is then dealt out in bands."""
    program, _ = model_program("conv_small")
    image = torch.randn(1, 3, side, side)
    alone = run(program, image, 1)
    for _ in range(5):
        assert_same_bits(run(program, image, threads), alone)


def test_python_threads_at_once(tier: str) -> None:
    """The same and different blocks, one and two threads each, in four Python threads."""
    blocks = [TestBlock.random(**structure(name, "relu6")).native() for name in STRUCTURES]
    program, _ = model_program("conv_small")
    images = [torch.randn(2, desc["c_in"], 23, 17) for desc in STRUCTURES.values()]
    photo = torch.randn(1, 3, 96, 96)
    expected = [run(block, x) for block, x in zip(blocks, images, strict=True)]
    logits = run(program, photo)
    start = threading.Barrier(4)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(3):
            for i in range(len(blocks)):
                # half of the workers go in step, on the same block
                at = i if worker < 2 else (i + worker + turn) % len(blocks)
                assert_same_bits(run(blocks[at], images[at], 1 + worker % 2), expected[at])
            assert_same_bits(run(program, photo, 1 + worker % 2), logits)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, worker) for worker in range(4)]:
            future.result()


def forward(program: Any, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    n, _, h, w = x.shape
    out = nan_output(program.output_shape(n, h, w))
    program.forward(x.data_ptr(), n, h, w, tuple(x.stride()), out.data_ptr(), threads)
    return out


def test_workspaces_of_threads(tier: str) -> None:
    """Each thread has its own; what lies in it, and whether it is kept, changes no bit."""
    program = core().Program([TestBlock.random(**structure("FFN")).native() for _ in range(3)])
    small, large = torch.randn(1, 19, 8, 9), torch.randn(1, 19, 190, 200)
    limit, need = core().WORKSPACE_LIMIT, program.workspace_bytes(1, 8, 9, 1)
    assert 0 < need < limit < program.workspace_bytes(1, 190, 200, 2)
    expected = [run(program, x) for x in (small, large)]
    start = threading.Barrier(3)

    def work() -> None:
        assert core().workspace_kept() == 0
        start.wait()
        for _ in range(2):
            assert forward(program, torch.full_like(small, NAN)).isnan().any()
            kept = core().workspace_kept()
            assert need <= kept <= limit
            assert_same_bits(forward(program, small), expected[0])
            assert_same_bits(forward(program, large, 2), expected[1])
            assert core().workspace_kept() == kept
        assert forward(program, small[:0]).shape[0] == 0

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(work) for _ in range(3)]:
            future.result()


def test_the_gil_is_released() -> None:
    """Python goes on counting in the middle of a native call."""
    block = TestBlock.random(**ib(64, 256, 64, "gelu", mid_kernel=5)).native()
    x = torch.randn(1, 64, 56, 56)
    began = time.perf_counter()
    run(block, x)
    batch = max(2, int(0.4 / (time.perf_counter() - began)))
    x = x.expand(batch, 64, 56, 56)
    out = torch.empty(batch, 56, 56, 64)
    span = [0.0, 0.0]
    begin = threading.Event()

    def work() -> None:
        begin.set()
        span[0] = time.perf_counter()
        block.run(x.data_ptr(), batch, 56, 56, tuple(x.stride()), out.data_ptr(), 1)
        span[1] = time.perf_counter()

    worker = threading.Thread(target=work)
    worker.start()
    begin.wait()
    ticks = []
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    length = span[1] - span[0]
    inside = [tick for tick in ticks if span[0] + 0.2 * length < tick < span[1] - 0.2 * length]
    assert len(inside) >= 3, (length, len(ticks))


def test_ops_pass_torchs_number_of_threads() -> None:
    from mnv4_ops.ops import cpu, layout

    seen: list[int] = []

    class Native:
        def run(self, *args: Any) -> None:
            seen.append(args[-1])

    weight = torch.randn(8, 4, 1, 1)
    found = layout.LAYOUTS["conv_bn_act"]([weight, *[None] * 5], [0.0], 1, "symmetric", "relu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            cpu.run(Native(), found, torch.randn(1, 4, 3, 3))
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


# prints the OpenMP runtimes in the process at each step
PROBE = """
import array, json, sys
def runtimes():
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "/" in line}
    return sorted(p for p in paths if any(n in p.rsplit("/", 1)[-1] for n in ("libgomp", "libomp", "libiomp5")))
def run(core):
    block = core.Block(c_in=16, c_mid=16, c_out=16, expand=True)
    weight, x = array.array("f", range(256)), array.array("f", [1.0] * 16 * 64)
    out = array.array("f", [0.0] * 16 * 64)
    block.pack(1, weight.buffer_info()[0])
    block.run(x.buffer_info()[0], 1, 8, 8, (1024, 1, 128, 16), out.buffer_info()[0], 2)
    assert out[0] == sum(range(16)) and out[-1] == sum(range(240, 256)), out
def step(name):
    found[name] = runtimes(), core.openmp_runtime() if core else None
found, core = {}, None
if sys.argv[1] == "torch first":
    import torch
    torch.ones(512, 512) @ torch.ones(512, 512)
    step("torch")
from mnv4_ops._native import core
step("import")
run(core)
step("run")
import torch
run(core)
step("both")
print(json.dumps(found))
"""


def probe(order: str) -> dict[str, tuple[list[str], str | None]]:
    # away from the working directory, with this very package first
    path = str(Path(mnv4_ops.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, order], env=env, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_no_second_openmp_runtime() -> None:
    found = probe("torch first")
    libraries, _ = found["torch"]
    assert all(libs == libraries for libs, _ in found.values()), found
    for step in ("import", "run", "both"):
        used = found[step][1]
        assert used is None if not libraries else os.path.realpath(str(used)) in map(os.path.realpath, libraries), found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_without_torch_std_threads_serve_and_torchs_runtime_is_found_later() -> None:
    found = probe("alone")
    assert found["import"] == [[], None]
    assert found["run"] == [[], None]
    assert found["both"][1] == probe("torch first")["both"][1]


def test_every_kind_is_among_the_large_images() -> None:
    kinds = {e.spec.kind for e in ledger() if e.model.startswith("conv")} - {"AvgPool", "Linear"}
    assert kinds <= set(LARGEST)
