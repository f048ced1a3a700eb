"""CUDA graphs on a GPU: ours and the caller's, weights that change, replays of several threads."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import mnv4_ops
from mnv4_ops import _native, graphs, patch
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(_native.core is None, reason="no native library"),
]


@pytest.fixture(autouse=True)
def _off() -> Any:
    yield
    patch.disable()
    gc.collect()
    torch.cuda.empty_cache()


def make(seed: int = 0, name: str = "mobilenetv4_conv_small_050") -> Any:
    model = randomize_(timm.create_model(name, num_classes=100), seed).eval()
    return model.to("cuda", torch.float16).to(memory_format=torch.channels_last)


def image(*shape: int) -> Tensor:
    x = torch.randn(shape or (2, 3, 96, 96), generator=torch.Generator().manual_seed(sum(shape)))
    return x.to("cuda", torch.float16).to(memory_format=torch.channels_last)


def plain(model: Any, x: Tensor) -> Tensor:
    """Kernel by kernel."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graphs, "_usable", lambda x: False)
        return model(x)


def recordings() -> list[Any]:
    return [r for pool in graphs._pools.values() for r in pool.recordings.values()]


def test_replays_are_equal_and_outputs_are_the_callers() -> None:
    model, inputs = make(), [image() * k for k in (1, 2, 3)]
    mnv4_ops.enable(cuda_graphs=True)
    with torch.inference_mode():
        want = [plain(model, x) for x in inputs]
        got = [model(x) for x in inputs]
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
        assert graphs.count() == 1
        features = model.forward_features(inputs[0])
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(features, plain(model.forward_features, inputs[0]))
        assert graphs.count() == 2
    with torch.no_grad():
        # made in inference mode, used outside of it
        assert torch.equal(model(inputs[0]), want[0])


def test_changed_weights_are_seen() -> None:
    model, x = make(), image()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        before = model(x)
        graph = recordings()[0].graph
        model.blocks[2][1].pw_exp.conv.weight.mul_(2)
        after = model(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, plain(model, x))
        assert recordings()[0].graph is graph
        model.blocks[2][1].pw_exp.conv.weight.data.div_(2)
        mnv4_ops.repack(model)
        assert torch.equal(model(x), before)


def test_more_shapes_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 3)
    model = make()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        for n in (1, 2, 3, 4, 5, 1, 3):
            x = image(n, 3, 64, 64)
            assert torch.equal(model(x), plain(model, x))
            assert torch.equal(model(x), plain(model, x))
    assert graphs.count() == 3


def test_again_after_all_graphs_were_dropped() -> None:
    model, x = make(), image()
    with torch.no_grad():
        for _ in range(3):
            mnv4_ops.enable(model, cuda_graphs=True)
            got = model(x)
            assert torch.equal(got, plain(model, x))
            assert graphs.count() == 1
            mnv4_ops.disable()
            assert graphs.count() == 0


def test_memory_comes_back() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = make()
    mnv4_ops.enable(cuda_graphs=True)
    with torch.no_grad():
        model(image(64, 3, 128, 128))
    del model
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert graphs.count() == 0
    assert torch.cuda.memory_reserved() <= before + 32 * 2**20


def test_threads_on_their_own_streams() -> None:
    models, inputs = [make(1), make(2)], [image(2, 3, 64, 64), image(3, 3, 96, 96)]
    with torch.no_grad(), mnv4_ops.enable():
        want = [[m(x) for x in inputs] for m in models]
    torch.cuda.synchronize()
    mnv4_ops.enable(cuda_graphs=True)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        try:
            start.wait(60)
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                results = [(k % 2, models[i % 2](inputs[k % 2])) for k in range(40)]
                torch.cuda.current_stream().synchronize()
                for k, got in results:
                    assert torch.equal(got, want[i % 2][k])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    assert graphs.count() == 4


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"])
def test_a_capture_of_the_callers(name: str) -> None:
    model, x = make(name=name), image()
    # also with our own graphs, which stand aside inside a capture
    mnv4_ops.enable(model, cuda_graphs=True)
    with torch.inference_mode():
        want = plain(model, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                plain(model, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        if name.startswith("mobilenetv4_conv"):
            assert torch.equal(out, want)
        else:
            torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        # seen by the graph after the next call, or after repack
        model.conv_stem.weight.mul_(1.1)
        changed = plain(model, x)
        graph.replay()
        torch.testing.assert_close(out, changed, rtol=1e-2, atol=1e-2)
        model.conv_stem.weight.mul_(1.1)
        mnv4_ops.repack(model)
        graph.replay()
        torch.testing.assert_close(out, plain(model, x), rtol=1e-2, atol=1e-2)
        assert not torch.equal(out, changed)


def test_a_capture_before_the_first_call_runs_the_original() -> None:
    model, x = make(), image()
    with torch.inference_mode():
        want = model(x)
        mnv4_ops.enable(model)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
        assert mnv4_ops.explain(model, x).served


def test_equal_bits_from_run_to_run() -> None:
    for name in ("mobilenetv4_conv_small", "mobilenetv4_conv_large"):
        model, x = make(name=name), image(3, 3, 128, 128)
        with torch.inference_mode(), mnv4_ops.enable():
            first = model(x)
            assert all(torch.equal(model(x), first) for _ in range(10))
            with mnv4_ops.enable(cuda_graphs=True):
                assert all(torch.equal(model(x), first) for _ in range(10))
