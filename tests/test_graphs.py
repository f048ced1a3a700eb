"""`enable(cuda_graphs=True)` with graphs that are played by running the blocks again, on tensors of the CPU."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import standin
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, cache, graphs, patch
from mnv4_ops.reference import create_model, randomize_

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")


@pytest.fixture(autouse=True)
def _serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with standin.serving_cpu(monkeypatch):
        yield
        patch.disable()
        cache.drop()


def make(seed: int = 0) -> Any:
    return randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=6), seed).eval().half()


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (1, 3, 64, 64), generator=torch.Generator().manual_seed(sum(shape))).half()


def recordings() -> list[Any]:
    return [r for pool in graphs._pools.values() for r in pool.recordings.values()]


def replays() -> list[int]:
    return [r.graph.replays for r in recordings()]


def test_captured_once_and_replayed() -> None:
    model, x = make(), image()
    with torch.no_grad():
        mnv4_ops.enable()
        want = model(x)
        assert graphs.count() == 0
        with mnv4_ops.enable(cuda_graphs=True):
            first, second = model(x), model(x * 2)
            assert replays() == [2]
            assert torch.equal(first, want)
            third = model(x)
            assert torch.equal(third, want)
            # each caller's own
            assert len({t.data_ptr() for t in (first, second, third)}) == 3
            assert not torch.equal(second, want)
            assert mnv4_ops.explain(model, x).served
            assert replays() == [3]
        assert graphs.count() == 0
        assert torch.equal(model(x), want)


def test_a_graph_for_each_kind_of_input_and_method() -> None:
    model = make()
    mnv4_ops.enable(model, cuda_graphs=True)
    x = image(2, 3, 64, 64)
    with torch.inference_mode():
        for given in (x, x.to(memory_format=torch.channels_last), x[:1], x[..., :63], x, x[:1]):
            torch.testing.assert_close(model(given), model(given.clone()))
        kinds = graphs.count()
        # channels_last is another layout, and so is the cut row
        assert kinds == 5
        model.forward_features(x)
        assert graphs.count() == kinds + 1
        model.forward_head(model.forward_features(x))
        assert graphs.count() == kinds + 1
        model.float()(x.float())
    with torch.no_grad():
        model(x.float())
    conv = torch.backends.cudnn.conv
    before, count = conv.fp32_precision, graphs.count()
    try:
        conv.fp32_precision = "ieee" if before == "tf32" else "tf32"
        with torch.no_grad():
            model(x.float())
    finally:
        conv.fp32_precision = before
    assert graphs.count() == count + 1


def test_changed_weights_are_seen() -> None:
    model, x = make(), image()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        before = model(x)
        model.blocks[2][1].pw_exp.conv.weight.mul_(1.5)
        after = model(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(model)(x))
        # the same graph, since the blocks kept their memory; one for the copy, which is gone
        gc.collect()
        assert replays() == [2]
        block = model.blocks[2][1]
        block.pw_exp.bn.act = block.dw_mid.bn.act = nn.GELU()
        assert torch.equal(model(x), copy.deepcopy(model)(x))
        gc.collect()
        # a new block has other memory
        assert replays() == [1]


def test_repack_disable_and_the_end_of_a_model_drop_graphs() -> None:
    model, other, x = make(), make(1), image()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        model(x)
        other(x)
        model.blocks[2][1].pw_exp.conv.weight.data.mul_(1.5)
        mnv4_ops.repack(model)
        assert graphs.count() == 1
        assert torch.equal(model(x), copy.deepcopy(model)(x))
        gc.collect()
        assert graphs.count() == 2
        del other
        gc.collect()
        assert graphs.count() == 1
        mnv4_ops.disable()
        assert not recordings()


def test_which_models() -> None:
    model, other, x = make(), make(1), image()
    with torch.no_grad():
        mnv4_ops.enable()
        mnv4_ops.enable(model, cuda_graphs=True)
        model(x)
        other(x)
        assert graphs.count() == 1
        with mnv4_ops.enable(cuda_graphs=True):
            other(x)
            assert graphs.count() == 2
        assert graphs.count() == 1
        mnv4_ops.enable()
        model(x)
        assert replays() == [2]
        mnv4_ops.disable()
        mnv4_ops.enable(cuda_graphs=True)
        mnv4_ops.enable()
        model(x)
        assert replays() == [1]
    ours = randomize_(create_model("conv_small_035")).eval().half()
    with torch.no_grad():
        ours(x)
    assert graphs.count() == 2


def test_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make().float(), image().float()
    mnv4_ops.enable(cuda_graphs=True)
    model(x)  # grad mode, parameters that require grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.no_grad():
        handle = model.blocks[1][0].register_forward_hook(lambda *a: None)
        model(x)
        handle.remove()
        model.eval()
        assert graphs.count() == 0
        model(x)
        assert graphs.count() == 1
        with monkeypatch.context() as inner:
            inner.setattr(graphs, "_usable", lambda x: False)
            model(x)
        assert replays() == [1]
        seen = []
        model.register_forward_hook(lambda m, args, out: seen.append(out))
        got = model(x)
        assert seen[0] is got
        assert replays() == [2]
        # attention of many key heads runs its own modules, whose hooks a graph would skip
        hybrid = timm.create_model("mobilenetv4_hybrid_medium_075", num_classes=3)
        hybrid.blocks[3][8] = B.MobileAttention(192, 192, num_heads=4, use_multi_query=False)
        randomize_(hybrid.eval())
        hybrid(x)
        assert graphs.count() == 1


def test_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 3)
    model = make()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        for n in (1, 2, 3, 1, 4):
            model(image(n, 3, 32, 32))
    assert [r.x.shape[0] for r in recordings()] == [3, 1, 4]


def test_a_capture_that_fails_is_said_once_and_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standin.Device, "fails", True)
    model, x = make(), image()
    mnv4_ops.enable()
    with torch.no_grad():
        want = model(x)
        mnv4_ops.enable(cuda_graphs=True)
        with pytest.warns(RuntimeWarning, match="could not be captured into a CUDA graph .* not permitted"):
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)
    assert graphs.count() == 0


def test_threads() -> None:
    models = [make(seed) for seed in (1, 2)]
    inputs = [image(1, 3, 32, 32), image(2, 3, 32, 32)]
    with torch.no_grad(), mnv4_ops.enable():
        want = [[m(x) for x in inputs] for m in models]
    mnv4_ops.enable(cuda_graphs=True)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            start.wait(30)
            with torch.inference_mode():
                for k in range(8):
                    assert torch.equal(models[i % 2](inputs[k % 2]), want[i % 2][k % 2])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not errors, errors[0]
    assert sum(replays()) == 32
    assert graphs.count() == 4
