"""torch.compile of enabled models: one graph, nothing stale, no copies, values as without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_cache
import torch
from small_models import model_of_few_blocks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import mnv4_ops
from mnv4_ops import _native, patch, traced
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(_native.core is None, reason="no native library"),
    # Dynamo reads a tensor's .grad attribute of non-leaf tensors and the like
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
SMALL = "mobilenetv4_conv_small_050"
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    patch.disable()


def model(name: str = SMALL, **options: Any) -> Any:
    return model_of_few_blocks(name, **({"num_classes": 6} | options))


class Ops:
    """A compiler backend that runs the graphs as they are and keeps the names of their ops."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []
        self.inputs: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.inputs.append(len(inputs))
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    def ours(self) -> list[str]:
        return [op for op in self.graphs[-1] if "mnv4" in op]


def original(m: Any, x: Tensor) -> Tensor:
    before = patch._switch.everything
    with torch.no_grad():
        patch._switch.everything = False
        try:
            return m(x)
        finally:
            patch._switch.everything = before


def by_itself(m: Any, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(m, backend=backend, fullgraph=True)


def inside(m: Any, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: m(x) * 1.0, backend=backend, fullgraph=True)


def touched(m: Any, backend: Any) -> Callable[[Tensor], Tensor]:
    """Inside of code that reads a parameter of the model."""
    p = next(m.parameters())
    return torch.compile(lambda x: m(x) + 0.0 * p.sum(), backend=backend, fullgraph=True)


ROUTES = {
    "by itself": (by_itself, "mnv4.module"),
    "inside": (inside, "mnv4.module"),
    "touched": (touched, "mnv4.program"),
}
route = pytest.mark.parametrize("route", ROUTES)


@route
def test_a_whole_model_is_one_op(route: str) -> None:
    m, ops = model(), Ops()
    compiled, name = ROUTES[route]
    with torch.no_grad():
        want = m(X)
        mnv4_ops.enable()
        got = compiled(m, ops)(X)
        assert ops.ours() == [name]
        assert torch.equal(got, m(X))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counters["graph_break"] == {}
    # parameters are inputs of the graph only where they have to be
    assert (ops.inputs[-1] > len(list(m.parameters()))) == (route == "touched")


def eps_of_a_norm(block: Any) -> None:
    block.pw_exp.bn.eps = 0.5


def train_mode_of_a_norm(block: Any) -> None:
    block.pw_exp.bn.train()


def own_forward_of_a_convolution(block: Any) -> None:
    conv = block.pw_exp.conv
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


CHANGES = [
    test_cache.in_place, test_cache.data_swap, test_cache.buffer_data_swap, test_cache.new_parameter, test_cache.load,
    test_cache.load_assign, test_cache.train_forward, test_cache.half_and_back, test_cache.ema, test_cache.reset,
    test_cache.other_activation, test_cache.skip, eps_of_a_norm, train_mode_of_a_norm,
    own_forward_of_a_convolution,
]  # fmt: skip


@pytest.mark.parametrize(("part", "route"), [("model", "by itself"), ("model", "inside"), ("block", "inside")])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_no_change_goes_unseen(change: Callable[[Any], None], part: str, route: str) -> None:
    """Of a block with skip, alone and in its model, between two calls of compiled code."""
    m: Any = model()
    block = m.blocks[2][1]
    x, inner = X, torch.randn(2, block.pw_proj.conv.out_channels, 6, 5)
    if part == "block":
        m.blocks = nn.Sequential(nn.Sequential(), nn.Sequential(), nn.Sequential(nn.Identity(), block))
        m, x = Backbone(m), inner
    mnv4_ops.enable()
    compiled, _ = ROUTES[route]
    f = compiled(m, "eager")
    with torch.no_grad():
        first = f(x)
        if change is test_cache.train_forward:
            block.train()
            block(inner * 3)
            block.eval()
        else:
            change(block)
        reference = copy.deepcopy(m)
        got = f(x)
        torch.testing.assert_close(got, original(reference, x), rtol=1e-4, atol=1e-4)
    if change is not test_cache.half_and_back:
        assert not torch.equal(got, first)


class Backbone(nn.Module):
    """The last block of a model."""

    def __init__(self, m: Any) -> None:
        super().__init__()
        self.block = m.blocks[2][1]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("grown", ["blocks", "stage"])
@pytest.mark.parametrize("route", ["inside", "touched"])
def test_a_block_that_is_added_is_seen(grown: str, route: str) -> None:
    m = model()
    mnv4_ops.enable()
    compiled = ROUTES[route][0](m, "eager")
    with torch.no_grad():
        first = compiled(X)
        block = copy.deepcopy(m.blocks[2][1])
        if grown == "blocks":
            m.blocks.insert(3, nn.Sequential(block))
        else:
            m.blocks[2].append(block)
        got = compiled(X)
        torch.testing.assert_close(got, original(m, X), rtol=1e-3, atol=1e-3)
    assert not torch.equal(got, first)


def test_two_models_of_one_class_do_not_share_a_graph() -> None:
    first, second = model(), model()
    randomize_(second, seed=9)
    mnv4_ops.enable()
    with torch.no_grad():
        for m in (first, second, first):
            torch.testing.assert_close(by_itself(m, "eager")(X), m(X), rtol=1e-4, atol=1e-4)


def test_many_models_of_one_class_compile() -> None:
    """More than torch compiles one function for."""
    mnv4_ops.enable()
    blocks = [model(num_classes=n) for n in range(1, traced.HANDLES + 2)]
    with torch.no_grad():
        for m in blocks:
            torch.testing.assert_close(by_itself(m, "eager")(X), original(m, X), rtol=1e-4, atol=1e-4)
    assert len(traced._served) <= traced.HANDLES
    del blocks, m
    torch.compiler.reset()


def test_one_function_for_many_models() -> None:
    first, second = model(), randomize_(model(), seed=9)
    mnv4_ops.enable()
    compiled = torch.compile(lambda m, x: m(x) * 1.0, backend="eager")
    with torch.no_grad():
        for m in (first, second, first, second):
            torch.testing.assert_close(compiled(m, X), original(m, X), rtol=1e-4, atol=1e-4)


def write_after(m: Any, x: Tensor) -> Tensor:
    out = m(x)
    m.conv_stem.weight.mul_(2)
    return out


def write_between(m: Any, x: Tensor) -> Tensor:
    before = m(x)
    m.conv_stem.weight.mul_(2)
    return m(x) - before


def write_to_an_alias(m: Any, x: Tensor) -> Tensor:
    before = m(x)
    m.alias[0].mul_(2)
    return m(x) - before


def parameter_exchanged(m: Any, x: Tensor) -> Tensor:
    own, m.classifier.weight = m.classifier.weight, m.others[0]["classifier.weight"]
    out = m(x)
    m.classifier.weight = own
    return out


def entry_exchanged(m: Any, x: Tensor) -> Tensor:
    own = m.classifier._parameters["weight"]
    m.classifier._parameters["weight"] = m.others[0]["classifier.weight"]
    out = m(x)
    m.classifier._parameters["weight"] = own
    return out


def given_some(m: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(m, {"classifier.weight": m.others[0]["classifier.weight"]}, (x,))


def given_own(m: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(m, {name: p * 1.1 for name, p in m.named_parameters()}, (x,))


WRITES = [write_after, write_between, write_to_an_alias]
GIVES = [parameter_exchanged, entry_exchanged, given_some, given_own]


@pytest.mark.parametrize(
    ("around", "backend"),
    [
        *((f, "aot_eager") for f in WRITES),
        *((f, "eager") for f in GIVES),
        *(pytest.param(f, "inductor", marks=pytest.mark.slow) for f in WRITES),
    ],
)
def test_what_a_graph_does_to_weights_counts(around: Callable[[Any, Tensor], Tensor], backend: str) -> None:
    """The same as without compiling: outputs, and the weights that are left."""
    m, x = model("mobilenetv4_conv_small_035"), X
    other = randomize_(copy.deepcopy(m), seed=5)
    # in lists: not modules of it, not in its state
    m.others = [dict(other.named_parameters())]
    m.alias = [m.conv_stem.weight.data]
    start = copy.deepcopy(m.state_dict())
    with torch.no_grad():
        want = around(m, x)
        left = copy.deepcopy(m.state_dict())
        m.load_state_dict(start)
        assert want.abs().max() > 1e-3
        mnv4_ops.enable()
        got = torch.compile(around, backend=backend)(m, x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
    torch.testing.assert_close(m.state_dict(), left)


@route
def test_a_dynamic_batch_takes_two_graphs(route: str) -> None:
    """One for batch 1, one for all others."""
    m = model()
    mnv4_ops.enable()
    compiled = ROUTES[route][0](m, "eager")
    with torch.no_grad():
        for n in (2, 3, 1, 5, 4):
            x = torch.randn(n, 3, 64, 64)
            torch.testing.assert_close(compiled(x), original(m, x), rtol=1e-3, atol=1e-3)
    # the first batch is compiled for itself before torch takes the size for dynamic
    assert counters["stats"]["unique_graphs"] <= 3
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        x = torch.randn(6, 3, 64, 64)
        torch._dynamo.mark_dynamic(x, 0)
        for batch in (x, torch.randn(9, 3, 64, 64), torch.randn(2, 3, 64, 64)):
            compiled(batch)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@route
def test_inductor_copies_nothing_round_our_ops(route: str) -> None:
    m = model()
    mnv4_ops.enable()

    def around(x: Tensor) -> Tensor:
        return m.forward_features(x * 2).relu() + 1

    compiled: Any = torch.compile(m if route == "by itself" else around, fullgraph=True)
    if route == "touched":
        traced._touched.add(m)
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = X.contiguous(memory_format=layout)
            got, (code, *_) = run_and_get_code(compiled, x)
            want = m(x) if route == "by itself" else around(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert "mnv4" in code
            body = code[code.index("def call(") :]
            kernels = [line for line in body.splitlines() if "cpp_fused" in line and "(" in line]
            assert "clone" not in body
            assert len(kernels) == (0 if route == "by itself" else 2), body
            torch.compiler.reset()


@pytest.mark.slow
def test_inductor_gives_the_values_of_the_original() -> None:
    m = model()
    mnv4_ops.enable()
    pyramid = randomize_(timm.create_model(SMALL, features_only=True)).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(m)(X), original(m, X), rtol=1e-3, atol=1e-3)
        for got, want in zip(torch.compile(pyramid)(X), original(pyramid, X), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_enable_and_disable_round_a_compiled_call() -> None:
    m, ops = model(), Ops()
    compiled = torch.compile(m, backend=ops)
    with torch.no_grad():
        want = compiled(X)
        with pytest.warns(RuntimeWarning, match=r"torch.compiler.reset\(\)"):
            mnv4_ops.enable(m)
        torch.testing.assert_close(compiled(X), want, rtol=1e-4, atol=1e-4)
        assert ops.ours() == ["mnv4.module"]
        with pytest.warns(RuntimeWarning, match=r"torch.compiler.reset\(\)"):
            patch.disable()
        assert torch.equal(compiled(X), want)
        assert ops.ours() == []


def test_explain_tells_of_compiled_models() -> None:
    m = model()
    mnv4_ops.enable()
    with torch.no_grad():
        compiled: Any = torch.compile(m, backend="eager")
        compiled(X)
        report = mnv4_ops.explain(compiled, X)
    assert len(report.served) == sum(len(stage) for stage in m.blocks) + 1
    assert not report.fallbacks


def test_a_switch_to_training_is_compiled_as_the_original() -> None:
    m, ops = model(), Ops()
    mnv4_ops.enable()
    compiled = torch.compile(m, backend=ops)
    with torch.no_grad():
        compiled(X)
        m.train()
        reference = copy.deepcopy(m)
        got = compiled(X)
        assert ops.ours() == []
        torch.testing.assert_close(got, original(reference, X), rtol=1e-4, atol=1e-4)
        m.eval()
        torch.testing.assert_close(compiled(X), original(m, X), rtol=1e-4, atol=1e-4)
    compiled(X).sum().backward()
    assert m.conv_stem.weight.grad is not None
