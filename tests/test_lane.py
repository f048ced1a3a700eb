"""The short way of a whole model: taken after the first call, left whenever something is not as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mnv4_ops
from mnv4_ops import _native, cache, serve
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
core: Any = _native.core
pytestmark = pytest.mark.skipif(
    core is None or not core.lanes_found(), reason="waits for a torch whose state can be read"
)
X = torch.randn(2, 3, 32, 38, generator=torch.Generator().manual_seed(1))


class Ways:
    """Counts how often the long way was gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.long = 0
        checked = serve._checked

        def counted(*args: Any) -> Any:
            self.long += 1
            return checked(*args)

        monkeypatch.setattr(serve, "_checked", counted)

    def short(self, model: nn.Module, x: Tensor = X) -> bool:
        before = self.long
        self.out = model(x)
        return self.long == before


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    with torch.no_grad(), mnv4_ops.enable():
        yield Ways(monkeypatch)


def make() -> Any:
    return randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=5)).eval()


def warm(model: nn.Module, ways: Ways, x: Tensor = X) -> Tensor:
    assert not ways.short(model, x)
    first = ways.out
    assert ways.short(model, x)
    torch.testing.assert_close(ways.out, first, rtol=0, atol=0)
    return first


def test_the_second_call_is_short_and_equal(ways: Ways) -> None:
    model = make()
    first = warm(model, ways)
    assert ways.short(model)
    assert ways.out.data_ptr() != first.data_ptr()
    assert ways.out.is_contiguous()
    assert ways.out.dtype is torch.float32
    for x in (X[:1], X.contiguous(memory_format=torch.channels_last), X[:, :, ::2], X.flip(0)[:, :, 3:]):
        before = ways.out
        if not ways.short(model, x):
            before = ways.out
            assert ways.short(model, x)
            assert torch.equal(ways.out, before)
    assert ways.short(model)


@pytest.mark.parametrize("name", ["reset_classifier(0)", "hybrid"])
def test_other_outputs(name: str, ways: Ways) -> None:
    if name == "hybrid":
        model, x = randomize_(timm.create_model("mobilenetv4_hybrid_medium", num_classes=3)).eval(), X[:1]
    else:
        model, x = make(), X
        model.reset_classifier(0)
    first = warm(model, ways, x)
    assert first.dim() == 2


def test_changed_weights_and_structure(ways: Ways) -> None:
    model = make()
    first = warm(model, ways)
    model.blocks[0][0].conv.weight.mul_(2)
    assert not ways.short(model)
    assert not torch.equal(ways.out, first)
    assert ways.short(model)
    model.conv_head.weight.data = model.conv_head.weight.data * 1.5
    assert not ways.short(model)
    assert ways.short(model)
    model.train()
    assert not ways.short(model)
    model.eval()
    ways.short(model)
    assert ways.short(model)
    del model.blocks[-1]
    with pytest.raises(RuntimeError, match="channels"):  # torch's own
        model(X)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Names(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    pass


CONTEXTS: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu"),
    "dispatch mode": Watch,
    "function mode": Names,
    "grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "profiler": lambda: torch.autograd.profiler.profile(),
    "explain": serve.observe,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    warm(model, ways)
    gone: list[int] = []
    run = cache.lanes[id(model)]

    def lane(module: Any, x: Any) -> Any:
        out = run(module, x)
        gone.append(out is not None)
        return out

    monkeypatch.setitem(cache.lanes, id(model), lane)
    with CONTEXTS[name]():
        model(X)
    assert gone == [False]
    model(X)
    assert gone[-1]


@pytest.mark.parametrize("kind", ["subclass", "negated", "float64", "channels", "rank", "empty", "inference", "meta"])
def test_inputs(kind: str, ways: Ways) -> None:
    model = make()
    warm(model, ways)

    def inference() -> Tensor:
        with torch.inference_mode():
            return X.clone()

    x: Any = {
        "subclass": lambda: X.as_subclass(Sub),
        "negated": lambda: torch._neg_view(X),  # type: ignore[attr-defined]
        "float64": lambda: X.double(),
        "channels": lambda: X[:, :2],
        "rank": lambda: X[0],
        "empty": lambda: X[:0],
        "inference": inference,
        "meta": lambda: X.to("meta"),
    }[kind]()
    assert cache.lanes[id(model)](model, x) is None


def test_global_hooks_threads_and_the_switch(ways: Ways) -> None:
    model = make()
    warm(model, ways)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert cache.lanes[id(model)](model, X) is None
    finally:
        handle.remove()
    assert ways.short(model)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert not ways.short(model)
    finally:
        torch.set_num_threads(before)
    assert ways.short(model)
    handle = model.blocks[1].register_forward_hook(lambda *args: None)
    assert not ways.short(model)
    handle.remove()
    ways.short(model)
    assert ways.short(model)
    mnv4_ops.disable()
    assert ways.short(model)  # the original forward
    assert not torch.equal(ways.out, cache.lanes[id(model)](model, X))


def test_tracing_and_functorch(ways: Ways) -> None:
    model = make()
    first = warm(model, ways)
    traced = torch.jit.trace(model, X, check_trace=False)
    assert "mnv4" not in str(traced.inlined_graph)
    assert ways.short(model)
    mapped = torch.func.vmap(model, randomness="same")(X[None])
    torch.testing.assert_close(mapped[0], first, rtol=1e-4, atol=1e-4)
    assert ways.short(model)


def test_many_shapes_and_threads_at_once(ways: Ways) -> None:
    model = make()
    inputs = [torch.randn(1, 3, 32 + 2 * i, 40) for i in range(12)]
    wanted = [model(x) for x in inputs]
    failures: list[str] = []

    def work() -> None:
        with torch.inference_mode():
            for _ in range(10):
                for x, want in zip(inputs, wanted, strict=True):
                    if not torch.equal(model(x), want):
                        failures.append(str(x.shape))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_has_a_case_of_its_own(ways: Ways) -> None:
    model = make()
    first = warm(model, ways)
    with torch.inference_mode():
        assert not ways.short(model)
        assert torch.equal(ways.out, first)
        assert ways.short(model)
        assert ways.out.is_inference()
        x = X.clone()
        assert not ways.short(model, x)
        assert ways.short(model, x)
        assert torch.equal(ways.out, first)
    assert ways.short(model)
    assert not ways.out.is_inference()


def test_lanes_go_with_the_module(ways: Ways) -> None:
    model = make()
    warm(model, ways)
    key = id(model)
    run = cache.lanes[key]
    other = make()
    assert run(other, X) is None  # the lane of another module
    del model
    gc.collect()
    assert key not in cache.lanes
    assert run(other, X) is None


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="weak reference"):
        core.Lane(make(), None, None, [])


# in processes of their own: torch is looked at once, at first use
FIRST_USE = {
    "many threads": """
barrier, found = threading.Barrier(8), []
def work():
    barrier.wait()
    found.append(core.lanes_found())
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [True] * 8, found
""",
    "an error": """
def fails(*args): raise RuntimeError("not in this torch")
torch._neg_view = fails
assert not core.lanes_found()
model = mnv4_ops.reference.create_model("conv_small").eval()
with torch.no_grad(), mnv4_ops.enable():
    first, second = (model(torch.ones(1, 3, 32, 32)) for _ in range(2))
assert torch.equal(first, second)
assert not mnv4_ops.cache.lanes
""",
    "an interrupt": """
neg_view = torch._neg_view
def stopped(*args): raise KeyboardInterrupt
torch._neg_view = stopped
try:
    core.lanes_found()
except KeyboardInterrupt:
    torch._neg_view = neg_view
assert core.lanes_found() and torch._neg_view is neg_view
""",
}


@pytest.mark.parametrize("name", FIRST_USE)
def test_first_use(name: str) -> None:
    head = "import threading, torch, mnv4_ops.cache, mnv4_ops.reference\nfrom mnv4_ops._native import core\n"
    env = {**os.environ, "PYTHONPATH": str(Path(mnv4_ops.__file__).parent.parent), "MNV4_OPS_STRICT": "1"}
    command = [sys.executable, "-c", head + FIRST_USE[name]]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
