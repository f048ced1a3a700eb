"""A model's launches as one list, without a GPU: where buffers lie and which addresses a launch gets."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mnv4_ops.triton_kernels import chain as C
from mnv4_ops.triton_kernels.block import Block, Plan
from mnv4_ops.triton_kernels.launch import direct
from mnv4_ops.triton_kernels.plan import place


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_at_once_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    sizes = []
    for i in range(12):
        sizes += [(draw.randrange(0, 5000), i, i + 1), (draw.choice((0, 700, 9000)), i, i)]
    offsets, total = place(sizes)
    for a, (size, first, last) in zip(offsets, sizes, strict=True):
        assert a % 256 == 0
        assert a + size <= total
        for b, (other, f, e) in zip(offsets, sizes, strict=True):
            if (a, size, first) != (b, other, f) and f <= last and first <= e and size and other:
                assert a + size <= b or b + other <= a
    # three neighbours of the largest would do; first fit needs little more
    assert total <= 2 * max(sum(s for s, f, e in sizes if f <= i <= e) for i in range(13)) + 512 * 24


class Start:
    """A launch that is ready: notes what it is started with."""

    mapped = ()

    def __init__(self, log: list[Any], name: str, *pointers: tuple[str | None, int]) -> None:
        self.log, self.name, self.pointers = log, name, list(pointers)

    def parts(self) -> Any:
        def run(x: int, y: int, z: int, stream: int, *args: Any) -> None:
            self.log.append((self.name, (x, y, z), stream, args))

        return run, (3, 2, 1), ("function", "metadata"), self.pointers, ("tail",)


def test_addresses_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C, "current_stream", lambda index: 7)
    options: dict[str, Any] = {"dtype": torch.float16, "device": "cpu", "project": True}
    natives = [Block(c_in=8, c_mid=8, c_out=8, **options) for _ in range(3)]
    log: list[Any] = []
    plans = []
    for i in range(3):
        launches = [
            Start(log, f"{i}a", ("x", 0), ("scratch", 64)),
            Start(log, f"{i}b", ("scratch", 64), ("out", 16), (None, 99)),
        ]
        plan = Plan(launches, 512, {})  # type: ignore[arg-type]
        plan.ready = True
        plans.append(plan)
        natives[i]._plans[2, 4, 4, 0, None] = plan
    x = torch.zeros(2, 8, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    chain = C.link(natives, x, 0)
    assert chain is not None
    for _ in range(2):
        log.clear()
        out = chain.run(x)
        assert out.shape == (2, 8, 4, 4)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert [name for name, *_ in log] == ["0a", "0b", "1a", "1b", "2a", "2b"]
        assert all(grid == (3, 2, 1) and stream == 7 for _, grid, stream, _ in log)
        args = [a[2:-1] for *_, a in log]
        assert all(a[:2] == ("function", "metadata") and a[-1] == "tail" for *_, a in log)
        assert args[0][0] == x.data_ptr()
        assert args[5][1] == out.data_ptr() + 16
        for i in range(3):
            # the scratch of a block is its own, and the output of one the input of the next
            assert args[2 * i][1] == args[2 * i + 1][0]
            assert args[2 * i + 1][2] == 99
            if i:
                assert args[2 * i][0] + 16 == args[2 * i - 1][1]
    # not before every block has run, and not where the input must be copied
    assert C.link(natives, x.contiguous(), 0) is None
    plans[1].ready = False
    assert C.link(natives, x, 0) is None


@pytest.mark.parametrize("scratch", [None, "global_scratch_size", "profile_scratch_size", "gsan_enabled"])
def test_past_the_python_of_the_launcher(scratch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver gets what Triton's own launcher would give it; where that does more, it is called itself."""
    triton, backend = pytest.importorskip("triton"), pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())
    seen: list[Any] = []
    launcher = backend.CudaLauncher.__new__(backend.CudaLauncher)
    names = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    vars(launcher).update(dict.fromkeys((*names, "gsan_enabled"), 0))
    vars(launcher).update(
        launch=lambda *args: seen.append(args), num_ctas=1, launch_cooperative_grid=False, launch_pdl=True,
        arg_annotations="annotations", kernel_signature="signature",
    )  # fmt: skip
    head, tail = ("function", "metadata", None, None, None), ("tail", 5)
    ready = SimpleNamespace(parts=lambda: (launcher, (3, 2, 1), head, [("x", 0)], tail))
    if scratch is not None:
        vars(launcher)[scratch] = 64
        assert direct(ready) == ready.parts()
        return
    run, grid, first, pointers, last = direct(ready)
    assert run is not launcher or not triton.__version__.startswith(("3.6.", "3.7.", "3.8."))
    assert (grid, pointers, last) == ((3, 2, 1), [("x", 0)], tail)
    run(*grid, 7, *first, "pointer", *last)
    launcher(*grid, 7, *head, "pointer", *tail)
    assert seen[0] == seen[1]


def test_small_kernels_of_one_image_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnv4_ops.triton_kernels import build

    block = Block(
        c_in=64, c_mid=128, c_out=64, dtype=torch.float16, device="cpu", expand=True, mid_kernel=3, project=True
    )

    def early(n: int, side: int) -> list[bool]:
        launches = block.plan(n, side, side, block.choose(n, side, side)).launches
        assert all(set(launch._options) <= {"num_warps", "num_stages", "maxnreg", "launch_pdl"} for launch in launches)
        return [launch._options.get("launch_pdl", False) for launch in launches]

    # no such GPU here
    assert not any(early(1, 8))
    monkeypatch.setattr(build, "dependent_programs", lambda: 132)
    assert all(early(1, 8))
    assert not any(early(2, 8))
    assert not any(early(1, 200))
