"""Packed weights follow the module: every way of changing weights is seen, entries go with the module."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, cache, patch
from mnv4_ops.reference import UIB, randomize_
from mnv4_ops.spec import UIBSpec

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
X = torch.randn(2, 16, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _on() -> Any:
    patch.enable()
    yield
    patch.disable()


def make() -> Any:
    return randomize_(B.UniversalInvertedResidual(16, 16, dw_kernel_size_start=3, layer_scale_init_value=0.5)).eval()


def in_place(block: Any) -> None:
    with torch.no_grad():
        block.pw_exp.conv.weight.mul_(1.5)


def data_swap(block: Any) -> None:
    block.pw_exp.conv.weight.data = block.pw_exp.conv.weight.data * 1.5


def buffer_data_swap(block: Any) -> None:
    block.dw_mid.bn.running_var.data = block.dw_mid.bn.running_var.data * 2


def new_parameter(block: Any) -> None:
    block.pw_proj.conv.weight = nn.Parameter(block.pw_proj.conv.weight.detach() * 2)


def new_bias(block: Any) -> None:
    block.pw_proj.conv.bias = nn.Parameter(torch.ones(16))


def new_module(block: Any) -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    block.dw_start.conv = conv


def other_activation(block: Any) -> None:
    block.pw_exp.bn.act = nn.GELU()
    block.dw_mid.bn.act = nn.GELU()


def eps(block: Any) -> None:
    block.pw_exp.bn.eps = 0.5


def gamma(block: Any) -> None:
    with torch.no_grad():
        block.layer_scale.gamma.neg_()


def load(block: Any) -> None:
    block.load_state_dict(randomize_(copy.deepcopy(block), seed=7).state_dict())


def load_assign(block: Any) -> None:
    block.load_state_dict(randomize_(copy.deepcopy(block), seed=7).state_dict(), assign=True)


def optimizer_step(block: Any) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    with torch.enable_grad():
        block(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adam_step(block: Any) -> None:
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, foreach=True)
    with torch.enable_grad():
        block(X).square().mean().backward()
    optimizer.step()


def train_forward(block: Any) -> None:
    block.train()
    with torch.no_grad():
        block(X * 3)
    block.eval()


def half_and_back(block: Any) -> None:
    block.half().float()


def double_and_back(block: Any) -> None:
    block.double().float()


def ema(block: Any) -> None:
    with torch.no_grad():
        for p in block.parameters():
            p.lerp_(torch.ones_like(p), 0.1)


def reset(block: Any) -> None:
    block.dw_mid.bn.reset_running_stats()


def set_data(block: Any) -> None:
    with torch.no_grad():
        block.pw_exp.conv.weight.set_(torch.ones_like(block.pw_exp.conv.weight))


def swap_tensors(block: Any) -> None:
    other = nn.Parameter(torch.ones_like(block.pw_exp.conv.weight))
    torch.utils.swap_tensors(block.pw_exp.conv.weight, other)


def skip(block: Any) -> None:
    block.has_skip = False


CHANGES: list[Callable[[Any], None]] = [
    in_place, data_swap, buffer_data_swap, new_parameter, new_bias, new_module, other_activation, eps, gamma, load,
    load_assign, optimizer_step, adam_step, train_forward, half_and_back, double_and_back, ema, reset, set_data,
    swap_tensors, skip,
]  # fmt: skip


def check(block: Any) -> Tensor:
    with torch.no_grad():
        assert mnv4_ops.explain(block, X).served
        got = block(X)
        patch.disable()
        torch.testing.assert_close(got, block(X), rtol=1e-4, atol=1e-4)
        patch.enable()
    return got


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(change: Callable[[Any], None]) -> None:
    block = make()
    before = check(block)
    change(block)
    after = check(block)
    if change not in (half_and_back, double_and_back):
        assert not torch.equal(before, after)
    check(block)


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_view_of_another_dtype_at_the_same_address_is_seen(name: str) -> None:
    core: Any = _native.core
    block = make().requires_grad_(False)
    check(block)
    guard: Any = cache._sides[id(block)].plans["uib"].guard
    t = block.pw_exp.conv.weight if name == "weight" else block.pw_exp.bn.running_var
    t.data = t.data.view(torch.int32)
    assert guard.check(block, False) == core.Guard.STALE
    assert name in guard.where()
    with torch.no_grad(), pytest.raises(RuntimeError):
        block(X)  # what torch says
    t.data = t.data.view(torch.float32)
    assert guard.check(block, False) == 0
    if not core.dtype_word_found():
        pytest.skip("this torch keeps a dtype elsewhere: seen all the same, in more time")


def test_versions_and_addresses_are_read_without_python() -> None:
    core: Any = _native.core
    if not core.tensor_functions_found():
        pytest.skip("this torch has other functions: seen all the same, in more time")
    block = make().requires_grad_(False)
    check(block)
    guard: Any = cache._sides[id(block)].plans["uib"].guard
    assert guard.check(block, False) == 0
    kept = block.pw_exp.bn.running_mean.data
    block.pw_exp.bn.running_mean.data = kept.clone()
    assert guard.check(block, False) == core.Guard.STALE
    block.pw_exp.bn.running_mean.data = kept
    assert guard.check(block, False) == 0
    with torch.inference_mode():
        block.pw_exp.bn.running_mean.add_(0.0)
    assert guard.check(block, False) == core.Guard.STALE
    # an inference tensor in its place has no version to ask for
    with torch.inference_mode():
        block.pw_exp.bn.running_mean = torch.zeros(len(kept))
    assert guard.check(block, False) != 0


@pytest.mark.parametrize(
    "change", [in_place, train_forward, data_swap, new_module, load, skip], ids=lambda f: f.__name__
)
def test_a_change_is_seen_by_the_whole_model(change: Callable[[Any], None]) -> None:
    model: Any = randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=4)).eval()
    x = torch.randn(1, 3, 64, 64)
    block = model.blocks[2][1]

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            got = model(x)
            assert not mnv4_ops.explain(model, x).fallbacks
            patch.disable()
            want = model(x)
            patch.enable()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        return got, want

    before, _ = outputs()
    if change is train_forward:
        block.train()
        with torch.no_grad():
            model(x * 3)
        block.eval()
    elif change is new_module:
        block.pw_proj.conv = nn.Conv2d(*block.pw_proj.conv.weight.shape[1::-1], 1, bias=False)
    elif change is load:
        block.load_state_dict(randomize_(copy.deepcopy(block), seed=7).state_dict())
    else:
        change(block)
    after, _ = outputs()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("where", ["stage", "blocks", "empty stage"])
def test_a_block_that_is_added_is_seen(where: str) -> None:
    model: Any = randomize_(timm.create_model("mobilenetv4_conv_small_035", num_classes=4)).eval()
    model.blocks.insert(3, nn.Sequential())
    x = torch.randn(1, 3, 64, 64)
    patch.enable()
    with torch.no_grad():
        before = [model(x), model(x)][1]
        block = copy.deepcopy(model.blocks[2][1])
        if where == "blocks":
            model.blocks.insert(4, nn.Sequential(block))
        else:
            model.blocks[2 if where == "stage" else 3].append(block)
        after = model(x)
        assert not mnv4_ops.explain(model, x).fallbacks
        patch.disable()
        torch.testing.assert_close(after, model(x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, after, rtol=1e-2)


def test_weights_are_refilled_in_place() -> None:
    block = make()
    check(block)
    native = cache._sides[id(block)].packed["block"].native
    in_place(block)
    check(block)
    mnv4_ops.repack(block)
    check(block)
    assert cache._sides[id(block)].packed["block"].native is native


def test_inference_tensors_need_repack() -> None:
    with torch.inference_mode():
        block = make()
        first = block(X)
        assert mnv4_ops.explain(block, X).served
        block.pw_exp.conv.weight.mul_(2)
        mnv4_ops.repack(block)
        second = block(X)
        assert not torch.equal(first, second)
        block.pw_exp.conv.weight.div_(2)
        mnv4_ops.repack()
        assert torch.equal(block(X), first)


def test_hidden_writes_need_repack() -> None:
    block = make()
    with torch.no_grad():
        first = block(X)
        block.pw_exp.conv.weight.data.mul_(2)
        mnv4_ops.repack(block)
        assert not torch.equal(block(X), first)


def test_nothing_is_kept_of_a_dead_module() -> None:
    gc.collect()
    before = cache.stats()
    model: Any = timm.create_model("mobilenetv4_conv_small_035", num_classes=4).eval()
    # a reference from below upwards, as some libraries keep one
    object.__setattr__(model.blocks[2][1].pw_exp.conv, "owner", model)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        model.blocks[2][1](torch.randn(1, model.blocks[2][1].pw_exp.conv.in_channels, 4, 4))
    assert cache.stats()["blocks"] > before["blocks"]
    del model
    gc.collect()
    assert cache.stats() == before


def test_state_dict_keys_and_module_attributes_are_untouched() -> None:
    block = make()
    keys, attributes = list(block.state_dict()), [sorted(m.__dict__) for m in block.modules()]
    check(block)
    assert list(block.state_dict()) == keys
    assert [sorted(m.__dict__) for m in block.modules()] == attributes


def test_shared_weights_and_shared_blocks() -> None:
    a, b = make(), make()
    b.pw_exp.conv.weight = a.pw_exp.conv.weight
    check(a)
    check(b)
    in_place(a)
    check(a)
    check(b)
    twice = nn.Sequential(a, a)
    with torch.no_grad():
        got = twice(X)
        patch.disable()
        torch.testing.assert_close(got, twice(X), rtol=1e-3, atol=1e-3)


def test_training_does_not_pack() -> None:
    block = make()
    before = cache.stats()["blocks"]
    block(X)
    block.train()
    with torch.no_grad():
        block(X)
    assert cache.stats()["blocks"] == before


def test_reference_blocks_follow_their_weights() -> None:
    block = randomize_(UIB(UIBSpec(16, 32, 16, 3, 5, residual=True, layer_scale=True))).eval()
    first = check(block)
    with torch.no_grad():
        block.layer_scale.gamma.neg_()
    assert not torch.equal(check(block), first)


def test_many_threads_pack_once() -> None:
    block = make()
    with torch.no_grad():
        patch.disable()
        want = block(X)
        patch.enable()
    start, errors = threading.Barrier(6), []

    def work() -> None:
        try:
            start.wait(30)
            with torch.no_grad():
                for _ in range(5):
                    torch.testing.assert_close(block(X), want, rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    assert len(cache._sides[id(block)].packed) == 1
