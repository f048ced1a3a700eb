"""Whole models on a GPU: against timm in every dtype, what runs, memory, precision, several devices."""

from __future__ import annotations

import copy
import functools
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rule import assert_2x
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, cache, check_gpu, patch, reference
from mnv4_ops.reference import randomize_
from mnv4_ops.serve import StrictError
from mnv4_ops.spec import standard_resolution

timm = pytest.importorskip("timm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_native.core is None, reason="no native library")]

CONV = ["mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_conv_large"]
HYBRID = ["mobilenetv4_hybrid_medium", "mobilenetv4_hybrid_large"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
HALF = torch.float16


@pytest.fixture(autouse=True)
def _off() -> Any:
    yield
    patch.disable()
    gc.collect()
    torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def build(name: str, **options: Any) -> Any:
    return randomize_(timm.create_model(name, **options)).eval()


def image(*shape: int, dtype: torch.dtype = HALF, device: str = "cuda") -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return x.to(memory_format=torch.channels_last)


def on_gpu(model: nn.Module, dtype: torch.dtype = HALF) -> Any:
    return copy.deepcopy(model).to("cuda", dtype).to(memory_format=torch.channels_last)


def compare(model: nn.Module, x: Tensor, **options: Any) -> None:
    with torch.inference_mode(), check_gpu.ieee():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable(**options):
            got = model(x)
            again = model(x)
    for g, a, p, d in zip(*([t] if isinstance(t, Tensor) else t for t in (got, again, plain, double)), strict=True):
        assert_2x(g, p, d)
        # the same bits in every run
        assert torch.equal(g, a)


@DTYPES
@pytest.mark.parametrize("size", [(2, 96, 96), (1, 75, 101), (9, 64, 64)], ids=str)
@pytest.mark.parametrize("name", CONV + HYBRID)
def test_parity_under_strict(
    name: str, size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    n, h, w = size
    compare(on_gpu(build(name), dtype), image(n, 3, h, w, dtype=dtype))


@pytest.mark.parametrize("name", CONV)
def test_parity_at_full_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    side = standard_resolution(name.removeprefix("mobilenetv4_"))
    compare(on_gpu(build(name)), image(1, 3, side, side))
    compare(on_gpu(build(name)), image(8, 3, side, side))


@pytest.mark.parametrize(
    "options",
    [{"pad_type": "same"}, {"act_layer": nn.ReLU6}, {"act_layer": nn.GELU}, {"in_chans": 5}, {"bn_eps": 1e-3}],
    ids=lambda o: ",".join(o),
)
def test_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_(timm.create_model("mobilenetv4_conv_small_050", **options)).eval()
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    # random weights: some of them overflow in float16, in torch as in the kernels
    compare(on_gpu(model, torch.bfloat16), image(2, options.get("in_chans", 3), 65, 64, dtype=torch.bfloat16))


def test_layouts_frozen_norms_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small")), image(2, 3, 65, 70)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, x.contiguous())
    compare(model, torch.cat([x, x], 3)[..., ::2])
    compare(timm.layers.freeze_batch_norm_2d(copy.deepcopy(model)).eval(), x)
    compare(on_gpu(randomize_(timm.create_model("mobilenetv4_conv_small", features_only=True)).eval()), x)
    compare(on_gpu(randomize_(reference.create_model("conv_small", padding="same")).eval()), x)


def test_norms_in_float32_beside_half_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu(build("mobilenetv4_conv_small"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, image(2, 3, 64, 64))


@pytest.mark.no_poison
@pytest.mark.parametrize("name", CONV)
def test_no_aten_convolution_or_matmul_is_left(name: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    model, x = on_gpu(build(name)), image(1, 3, 64, 64)

    def ops() -> tuple[set[str], set[str]]:
        with torch.inference_mode():
            model(x)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
                model(x)
                torch.cuda.synchronize()
        names = {event.key for event in prof.key_averages()}
        kernels = {k for k in names if any(word in k for word in ("cudnn", "cublas", "cutlass", "xmma", "gemm"))}
        return {name for name in names if name.startswith("aten::")}, kernels

    assert any("conv" in op for op in ops()[0])
    with mnv4_ops.enable():
        left, kernels = ops()
    assert left <= {"aten::empty", "aten::empty_strided", "aten::as_strided", "aten::view"}, left
    assert not kernels


def test_changed_weights_and_statistics_are_seen() -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small_050")), image(2, 3, 64, 64)
    block = model.blocks[2][1]
    compare(model, x)
    with torch.no_grad():
        block.pw_exp.conv.weight.mul_(1.5)
    compare(model, x)
    mnv4_ops.enable()
    block.train()
    with torch.no_grad():
        model(x * 3)
    block.eval()
    mnv4_ops.disable()
    compare(model, x)
    compare(model.float(), x.float())
    compare(model.half(), x)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small_050")), image(1, 3, 64, 64)
    mnv4_ops.enable()

    def reasons(model: nn.Module, x: Tensor) -> str:
        with torch.no_grad():
            return str(mnv4_ops.explain(model, x))

    assert "original" not in reasons(model, x).split("\n", 1)[1]
    with torch.autocast("cuda", torch.bfloat16):
        assert "autocast is enabled" in reasons(copy.deepcopy(model).float(), x.float())
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.no_grad():
        for wrong, words in (
            (x.cpu().float(), "the input is on cpu, the weights are on cuda:0"),
            (x.float(), "float32"),
        ):
            with pytest.raises(StrictError, match=words):
                model(wrong)
        cpu = copy.deepcopy(model).cpu().float()
        with pytest.raises(StrictError, match="the input is on cuda:0, the weights are on cpu"):
            cpu(x.float())
        assert cpu(x.float().cpu()).shape == (1, 1000)


def test_fp32_follows_the_convolution_setting() -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small"), torch.float32), image(2, 3, 96, 96, dtype=torch.float32)
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    errors = {}
    try:
        with torch.inference_mode():
            double = copy.deepcopy(model).double()(x.double())
            for precision in ("ieee", "tf32"):
                conv.fp32_precision = precision
                plain = model(x)
                with mnv4_ops.enable():
                    got = model(x)
                errors[precision] = float((got.double() - double).abs().max())
                assert errors[precision] <= 2 * float((plain.double() - double).abs().max()) + 1e-5
    finally:
        conv.fp32_precision = before
    assert errors["ieee"] * 10 < errors["tf32"]


def test_side_streams_and_threads() -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small_050")), image(2, 3, 64, 64)
    errors: list[BaseException] = []
    start = threading.Barrier(4)
    mnv4_ops.enable()
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
    torch.cuda.synchronize()

    def work() -> None:
        try:
            start.wait(30)
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    got = model(x)
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(got, want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]


@pytest.mark.no_poison
@pytest.mark.parametrize(
    ("name", "side", "limit"),
    [
        ("mobilenetv4_conv_small", 224, 0.75),
        ("mobilenetv4_conv_medium", 256, 0.5),
        ("mobilenetv4_conv_large", 384, 0.5),
    ],
)
def test_peak_memory(name: str, side: int, limit: float) -> None:
    """At batch 256: the peak without the model's weights, input included, against eager channels_last."""
    model, x = on_gpu(build(name)), image(256, 3, side, side)

    def peak(before: int) -> int:
        with torch.inference_mode():
            model(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(x)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before + x.nbytes

    base = torch.cuda.memory_allocated()
    eager = peak(base)
    with mnv4_ops.enable():
        ours = peak(base)
    print(f"{name}: {ours / 2**20:.1f} MiB, eager {eager / 2**20:.1f} MiB, {ours / eager:.2f}x")
    assert ours <= limit * eager


@pytest.mark.no_poison
def test_host_time_of_a_small_model() -> None:
    """At most 15 us a part beyond the start of its kernels, on an idle host; the guard once a forward."""
    model, x = on_gpu(build("mobilenetv4_conv_small")), image(1, 3, 224, 224)
    mnv4_ops.enable()
    with torch.inference_mode():
        report = mnv4_ops.explain(model, x)
        plan: Any = cache.find(model, "forward")
        # what the kernels' own interface takes with everything else done
        program = plan.program
        outs = [torch.empty(shape, dtype=HALF, device="cuda") for _, shape, _ in program._meet(1, 224, 224)]
        outs = [o if o.dim() == 2 else o.contiguous(memory_format=torch.channels_last) for o in outs]

        def bare() -> None:
            y = x
            for native, out in zip(program.natives, outs, strict=True):
                native.run(y, out)
                y = out

        def clock(run: Any) -> float:
            times = []
            for _ in range(60):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                run()
                times.append(time.perf_counter() - begin)
            return sorted(times)[len(times) // 4]

        clock(bare)
        extra = clock(lambda: model(x)) - clock(bare)
    print(f"{extra * 1e6:.0f} us for {len(report.served)} parts")
    assert extra <= 15e-6 * len(report.served)


def test_raw_ops_and_compiled_models() -> None:
    from test_ops import CASES, expected

    for op, case in CASES.items():
        channels, params, eps, args = case()
        for dtype in (HALF, torch.float32):
            given = [None if p is None else p.to("cuda", dtype) for p in params]
            x = image(2, channels, 9, 8, dtype=dtype)
            double = expected(op, x.double(), [None if p is None else p.double() for p in given], eps, args)
            with check_gpu.ieee():
                got = getattr(torch.ops.mnv4, op)(x, given, eps, *args)
                assert_2x(got, expected(op, x, given, eps, args), double, op)
            torch.library.opcheck(getattr(torch.ops.mnv4, op).default, (x, given, eps, *args))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "mobilenetv4_conv_medium"])
def test_first_call(name: str, tmp_path: Path) -> None:
    """At most 60 s with an empty Triton cache, 2 s with a full one."""
    side = standard_resolution(name.removeprefix("mobilenetv4_"))
    code = f"""
import time, timm, torch, mnv4_ops
model = timm.create_model({name!r}).eval().cuda().half().to(memory_format=torch.channels_last)
x = torch.randn(1, 3, {side}, {side}, device="cuda", dtype=torch.half)
mnv4_ops.enable()
with torch.inference_mode():
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(x)
    torch.cuda.synchronize()
    print("seconds", time.perf_counter() - start)
    assert not mnv4_ops.explain(model, x).fallbacks
"""
    seconds = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "MNV4_OPS_STRICT": "1"},
        )
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.split("seconds")[1]))
    print(f"{name}: first call {seconds[0]:.1f} s cold, {seconds[1]:.2f} s warm")
    assert seconds[0] <= 60
    assert seconds[1] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_by_inductor(mode: str | None) -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small_050")), image(2, 3, 64, 64)
    torch.compiler.reset()
    with torch.no_grad():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        mnv4_ops.enable()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            got = compiled(x).clone()
            assert_2x(got, plain, double)
        model.blocks[2][1].pw_exp.conv.weight.mul_(1.5)
        torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_than_the_current_one() -> None:
    model, x = on_gpu(build("mobilenetv4_conv_small_050")), image(2, 3, 64, 64)
    with torch.no_grad(), mnv4_ops.enable(cuda_graphs=True):
        want = model(x)
        other, y = model.to("cuda:1"), x.to("cuda:1")
        assert torch.cuda.current_device() == 0
        for _ in range(3):
            got = other(y)
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.cpu(), want.cpu())


def test_nothing_is_kept_of_a_dead_model() -> None:
    gc.collect()
    torch.cuda.synchronize()
    before, blocks = torch.cuda.memory_allocated(), cache.stats()["blocks"]
    model, x = on_gpu(build("mobilenetv4_conv_small")), image(2, 3, 64, 64)
    with torch.no_grad(), mnv4_ops.enable():
        model(x)
        del model, x
        gc.collect()
        torch.cuda.synchronize()
        assert cache.stats()["blocks"] == blocks
        assert torch.cuda.memory_allocated() <= before + 2**20
