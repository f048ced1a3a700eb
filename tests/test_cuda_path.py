"""The GPU path of ops, cache and wrappers with kernels of plain torch operations, on tensors of the CPU."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import standin
import torch
import torch.nn.functional as F
from rule import assert_2x
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mnv4_ops
from mnv4_ops import _native, cache, patch, reference
from mnv4_ops.ops import cuda
from mnv4_ops.reference import randomize_
from mnv4_ops.serve import StrictError

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
DTYPES = pytest.mark.parametrize("dtype", standin.DTYPES, ids=str)
HALF = torch.float16


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with standin.serving_cpu(monkeypatch):
        yield
        patch.disable()
        cache.drop()


def make(dtype: torch.dtype = HALF, **options: Any) -> Any:
    given: dict[str, Any] = {"dw_kernel_size_start": 3, "dw_kernel_size_mid": 3, "exp_ratio": 2.0} | options
    return randomize_(B.UniversalInvertedResidual(16, 16, **given)).eval().to(dtype)


def image(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def small(**options: Any) -> Any:
    return randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=6, **options)).eval()


def compare(model: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        plain, double = model(x), copy.deepcopy(model).double()(x.double())
        with mnv4_ops.enable():
            got = model(x)
    for g, p, d in zip(*([t] if isinstance(t, Tensor) else t for t in (got, plain, double)), strict=True):
        assert_2x(g, p, d)
    return got


@DTYPES
@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_050", "mobilenetv4_hybrid_medium_075"])
def test_models(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_(timm.create_model(name, num_classes=5)).eval().to(dtype)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    compare(model, image(dtype, 2, 3, 64, 75))
    assert standin.calls[-1][0] == "Head"


@DTYPES
def test_blocks_of_a_model_and_its_other_methods(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small().to(dtype), image(dtype, 1, 3, 64, 64)
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.no_grad(), mnv4_ops.enable():
        features = model.forward_features(x)
        close = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}
        torch.testing.assert_close(model.forward_head(features), model(x), **close)
        torch.testing.assert_close(model.forward_intermediates(x)[0], features, **close)
        assert model.forward_head(features, pre_logits=True).dtype is dtype
    compare(randomize_(timm.create_model("mobilenetv4_conv_small_035", features_only=True)).eval().to(dtype), x)


def test_norms_in_float32_beside_half_weights() -> None:
    model = small().half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x = image(HALF, 2, 3, 64, 64)
    with torch.no_grad(), mnv4_ops.enable():
        assert not mnv4_ops.explain(model, x).fallbacks
        assert model(x).dtype is HALF


def test_frozen_batch_norm_layer_scale_and_reference_models() -> None:
    compare(timm.layers.freeze_batch_norm_2d(small()).eval().half(), image(HALF, 1, 3, 64, 64))
    compare(make(layer_scale_init_value=0.5), image(HALF, 2, 16, 7, 6))
    compare(randomize_(reference.create_model("conv_small_035")).eval().half(), image(HALF, 1, 3, 64, 64))


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make()
    mnv4_ops.enable()

    def reason(x: Tensor, module: nn.Module = block) -> str:
        with torch.no_grad():
            report = mnv4_ops.explain(module, x)
        assert [row.served for row in report.rows] == [False], str(report)
        return report.rows[0].by

    x = image(HALF, 2, 16, 7, 6)
    with torch.no_grad():
        report = mnv4_ops.explain(block, x)
    assert report.served[0].spec.dtype == "float16"
    # torch itself raises for most of these; what is asked here is that no kernel ran
    with pytest.raises(RuntimeError):
        block(x.float())
    monkeypatch.setenv("MNV4_OPS_STRICT", "1")
    with torch.no_grad(), pytest.raises(StrictError, match="the input is float32, the weights are float16"):
        block(x.float())
    monkeypatch.delenv("MNV4_OPS_STRICT")
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(x.float(), make(torch.float32)) == "autocast is enabled"
    with torch.no_grad(), pytest.raises(RuntimeError):
        make().double()(x)
    assert "float64, kernels take float16, bfloat16, float32" in reason(x.double(), make().double())
    block.pw_exp.conv.register_forward_hook(lambda *a: None)
    assert "hooks" in reason(x)
    assert "training" in reason(x, make().train())
    # within: the fixture has replaced it too
    with monkeypatch.context() as today:
        today.setattr(cuda, "unavailable", lambda: "there is no GPU today")
        assert reason(x) == "there is no GPU today"


def test_what_has_no_kernel_runs_its_original_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standin.Block, "refuse", ("start_kernel",))
    model, x = make(), image(HALF, 2, 16, 7, 6)
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(model, x)
        assert "start_kernel has no kernel" in report.fallbacks[0].by


def test_out_of_resources_runs_the_original_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        pass

    def run(self: Any, x: Tensor, out: Tensor, **options: Any) -> None:
        raise OutOfResources("shared memory")

    for module, x in ((make(), image(HALF, 2, 16, 7, 6)), (small().half(), image(HALF, 1, 3, 64, 64))):
        with torch.no_grad(), monkeypatch.context() as patched:
            want = module(x)
            patched.setattr(standin.Block, "run", run)
            patched.setattr(standin.Head, "run", run)
            with mnv4_ops.enable(cuda_graphs=True):
                assert torch.equal(module(x), want)
                assert "no configuration of a kernel fits" in str(mnv4_ops.explain(module, x))


def test_while_a_graph_is_captured_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnv4_ops import serve

    block, x = make(), image(HALF, 2, 16, 7, 6)
    mnv4_ops.enable()
    with torch.no_grad():
        monkeypatch.setattr(serve, "capturing", lambda x: True)
        assert "call the module once before" in mnv4_ops.explain(block, x).fallbacks[0].by
        monkeypatch.setattr(serve, "capturing", lambda x: False)
        block(x)
        monkeypatch.setattr(serve, "capturing", lambda x: True)
        assert mnv4_ops.explain(block, x).served


def test_weights_are_refilled_in_place_and_repack_does_so_at_once() -> None:
    block, x = make(), image(HALF, 2, 16, 7, 6)
    mnv4_ops.enable()
    with torch.no_grad():
        block(x)
        native = cache._sides[id(block)].packed["block"].native
        memory = {stage: {n: t.data_ptr() for n, t in p.items()} for stage, p in native.packed.items()}
        packs = native.packs
        block.pw_exp.conv.weight.mul_(2)
        compare(block, x)
        assert native.packs > packs
        before = native.packed[1]["weight"].clone()
        block.pw_exp.conv.weight.data.mul_(2)
        mnv4_ops.repack(block)
        assert torch.equal(native.packed[1]["weight"], 2 * before)
        compare(block, x)
    assert cache._sides[id(block)].packed["block"].native is native
    assert memory == {stage: {n: t.data_ptr() for n, t in p.items()} for stage, p in native.packed.items()}


def test_packing_again_without_a_change_writes_nothing() -> None:
    model, x = small().half(), image(HALF, 1, 3, 64, 64)
    mnv4_ops.enable()
    with torch.no_grad():
        model(x)
        natives = [p.native for m in model.modules() for p in packed_of(m)]
        packs = [n.packs for n in natives]
        # other plans of the same blocks
        model.forward_features(x)
        model.blocks[2][1](torch.zeros(1, model.blocks[2][1].pw_exp.conv.in_channels, 3, 3, dtype=HALF))
        assert [n.packs for n in natives] == packs
        model.blocks[2][1].pw_exp.bn.train()
        model(x)
        model.blocks[2][1].pw_exp.bn.eval()
        compare(model, x)


def packed_of(module: nn.Module) -> list[Any]:
    side = cache._sides.get(id(module))
    return [] if side is None else list(side.packed.values())


def test_inference_mode_makes_no_memory_that_cannot_be_filled_again() -> None:
    block, x = make(), image(HALF, 2, 16, 7, 6)
    mnv4_ops.enable()
    with torch.inference_mode():
        block(x)
    with torch.no_grad():
        block.pw_exp.conv.weight.mul_(2)
        compare(block, x)


def test_dtype_changes_make_new_blocks() -> None:
    block = make(torch.float32)
    for dtype in (torch.float32, HALF, torch.bfloat16, torch.float32):
        compare(block.to(dtype), image(dtype, 1, 16, 5, 5))


def test_fp32_precision_follows_the_convolution_setting() -> None:
    block, conv = make(torch.float32), torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        mnv4_ops.enable()
        with torch.no_grad():
            for setting, expected in (("tf32", True), ("ieee", False)):
                conv.fp32_precision = setting
                block(image(torch.float32, 1, 16, 5, 5))
                assert standin.calls[-1] == ("Block", expected)
            conv.fp32_precision = "tf32"
            block.half()(image(HALF, 1, 16, 5, 5))
            assert standin.calls[-1] == ("Block", False)
    finally:
        conv.fp32_precision = before


def test_empty_batch_starts_no_kernel() -> None:
    model = small().half()
    with torch.no_grad(), mnv4_ops.enable(cuda_graphs=True):
        assert model(image(HALF, 0, 3, 64, 64)).shape == (0, 6)
        assert not standin.calls


def test_training_forwards_are_noticed_by_the_raw_ops() -> None:
    """Their running statistics are not read back from a GPU on every call."""
    block, x = make(torch.float32), image(torch.float32, 2, 16, 7, 6)
    bn, conv = block.pw_exp.bn, block.pw_exp.conv
    params = [conv.weight.detach(), None, bn.weight.detach(), bn.bias.detach(), bn.running_mean, bn.running_var]

    def call() -> Tensor:
        return torch.ops.mnv4.conv_bn_act(x, params, [bn.eps], 1, "symmetric", "relu")

    def check() -> None:
        want = F.relu(F.batch_norm(F.conv2d(x, params[0]), *params[4:], *params[2:4], eps=bn.eps))
        torch.testing.assert_close(call(), want, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        mnv4_ops.enable()
        check()
        block.train()
        block(x * 3)
        block.eval()
        check()
        mnv4_ops.disable()
        block.train()(x * 5)
        mnv4_ops.enable()
        check()


@DTYPES
def test_raw_ops(dtype: torch.dtype) -> None:
    from test_ops import CASES, expected

    for op, case in CASES.items():
        channels, params, eps, args = case()
        params = [None if p is None else p.to(dtype) for p in params]
        x = image(dtype, 2, channels, 6, 7)
        got = getattr(torch.ops.mnv4, op)(x, params, eps, *args)
        plain = expected(op, x, params, eps, args)
        double = expected(op, x.double(), [None if p is None else p.double() for p in params], eps, args)
        assert_2x(got, plain, double, op)
        with pytest.raises(ValueError, match=f"mnv4::{op}: expected x of dtype"):
            getattr(torch.ops.mnv4, op)(x.to(torch.float64), params, eps, *args)
        other = torch.bfloat16 if dtype is HALF else HALF
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=f"expected x of dtype {name} like the weights"):
            getattr(torch.ops.mnv4, op)(x.to(other), params, eps, *args)


def test_a_pool_without_weights() -> None:
    x = image(HALF, 2, 9, 4, 5)
    got = torch.ops.mnv4.head(x, [None] * 18, [0.0] * 3, "relu")
    torch.testing.assert_close(got, x.mean((2, 3)))
    assert got.dtype is HALF


@DTYPES
def test_ops_on_fake_gpu_tensors(dtype: torch.dtype) -> None:
    from test_ops import CASES

    with FakeTensorMode() as mode:
        for op, case in CASES.items():
            channels, params, eps, args = case()
            params = [None if p is None else mode.from_tensor(p).to("cuda", dtype) for p in params]
            x = torch.empty(2, channels, 6, 7, dtype=dtype, device="cuda")
            out = getattr(torch.ops.mnv4, op)(x, params, eps, *args)
            assert out.device.type == "cuda"
            assert out.dtype is dtype
            assert out.dim() == 2 or out.is_contiguous(memory_format=torch.channels_last)
            with pytest.raises(ValueError, match="expected x of dtype float16 or bfloat16 or float32, got float64"):
                getattr(torch.ops.mnv4, op)(x.double(), params, eps, *args)


def test_opcheck_in_half() -> None:
    from test_ops import CASES

    for op, case in CASES.items():
        channels, params, eps, args = case()
        params = [None if p is None else p.half() for p in params]
        torch.library.opcheck(getattr(torch.ops.mnv4, op).default, (image(HALF, 2, channels, 5, 6), params, eps, *args))


@DTYPES
def test_compiled(dtype: torch.dtype) -> None:
    model, x = small().to(dtype), image(dtype, 1, 3, 64, 64)
    ops: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        mnv4_ops.enable()
        want = model(x)
        got = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.compiler.reset()
    assert [op for op in ops if "mnv4" in op] == ["mnv4.program"]
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_compiled_without_a_kernel_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standin.Block, "refuse", ("start_kernel",))
    block, x, ops = make(), image(HALF, 2, 16, 7, 6), []

    def backend(graph: Any, inputs: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        mnv4_ops.enable()
        torch.compile(block, backend=backend)(x)
    torch.compiler.reset()
    assert ops
    assert not any("mnv4" in op for op in ops)


def test_nothing_is_kept_of_a_dead_model() -> None:
    gc.collect()
    before = cache.stats()["blocks"]
    model = small().half()
    with torch.no_grad(), mnv4_ops.enable():
        model(image(HALF, 1, 3, 64, 64))
        assert cache.stats()["blocks"] > before
        del model
        gc.collect()
        assert cache.stats()["blocks"] == before


def test_a_compiled_model_is_packed_before_its_first_call() -> None:
    """Inductor's graphs count what their pool holds after the first call."""
    block, x = make(), image(HALF, 2, 16, 7, 6)
    entries: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        entries.append(cache.stats()["raw_entries"])
        return graph.forward

    cache.drop()
    torch.compiler.reset()
    mnv4_ops.enable()
    compiled = torch.compile(block, backend=backend)
    with torch.no_grad():
        compiled(x)
    assert entries == [1]
    assert cache.stats()["raw_entries"] == 1
    torch.compiler.reset()
