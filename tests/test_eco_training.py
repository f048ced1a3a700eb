"""enable() leaves training as it is, and evaluation sees what training did."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native, patch
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
SMALL = "mobilenetv4_conv_small_035"


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    patch.disable()


def model(**options: Any) -> Any:
    return randomize_(timm.create_model(SMALL, num_classes=4, **options))


def step(m: Any, x: Tensor, optimizer: Any = None) -> dict[str, Tensor]:
    m.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(m(x), torch.arange(len(x)) % 4).backward()
    grads = {name: p.grad.clone() for name, p in m.named_parameters()}
    if optimizer is not None:
        optimizer.step()
    return grads


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_bit_equal(training: bool, checkpointing: bool) -> None:
    m = model().train(training)
    m.set_grad_checkpointing(checkpointing)
    other = copy.deepcopy(m)
    x = torch.randn(3, 3, 64, 64)
    torch.manual_seed(0)
    want = step(m, x)
    mnv4_ops.enable()
    torch.manual_seed(0)
    got = step(other, x)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    for a, b in zip(m.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_gradient_of_the_input_and_of_some_parameters() -> None:
    m = model().eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    (want,) = torch.autograd.grad(m(x).sum(), x)
    mnv4_ops.enable()
    (got,) = torch.autograd.grad(m(x).sum(), x)
    assert torch.equal(got, want)
    # a frozen backbone with a trained classifier
    m.classifier.requires_grad_(True)
    m(x.detach()).sum().backward()
    assert m.classifier.weight.grad is not None


def test_a_training_loop_with_ema_and_evaluation() -> None:
    m = model()
    mnv4_ops.enable()
    ema = timm.utils.ModelEmaV3(m, decay=0.5)
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    x = torch.randn(3, 3, 64, 64)
    seen: list[Tensor] = []
    for _ in range(3):
        m.train()
        step(m, x, optimizer)
        ema.update(m)
        for evaluated in (m.eval(), ema.module.eval()):
            with torch.no_grad():
                assert not mnv4_ops.explain(evaluated, x).fallbacks
                got = evaluated(x)
                seen.append(got)
            torch.testing.assert_close(got, original(evaluated, x), rtol=1e-3, atol=1e-3)
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[2:], strict=False))


def original(m: Any, x: Tensor) -> Tensor:
    before, patch._switch.everything = patch._switch.everything, False
    try:
        with torch.no_grad():
            return m(x)
    finally:
        patch._switch.everything = before


class Stress:
    """Operations on a small network of two blocks; each leaves it in eval mode."""

    def __init__(self) -> None:
        blocks = [
            B.UniversalInvertedResidual(8, 8, dw_kernel_size_start=3, layer_scale_init_value=0.5),
            B.UniversalInvertedResidual(8, 12, dw_kernel_size_mid=5, stride=2, exp_ratio=2.0),
        ]
        self.net: Any = randomize_(nn.Sequential(*blocks)).eval()
        self.optimizer = self.new_optimizer()
        self.kept: list[Any] = [copy.deepcopy(self.net.state_dict())]
        self.x = torch.randn(2, 8, 7, 5)

    def new_optimizer(self) -> Any:
        kind = random.choice([torch.optim.SGD, torch.optim.Adam])
        return kind(self.net.parameters(), lr=1e-2, foreach=random.random() < 0.5)

    def step(self) -> None:
        if random.random() < 0.5:
            self.net.train()
        self.optimizer.zero_grad(set_to_none=random.random() < 0.5)
        self.net(self.x).square().mean().backward()
        self.optimizer.step()
        self.net.eval()

    def train_forward(self) -> None:
        self.net.train()
        with torch.no_grad():
            self.net(self.x * 2)
        self.net.eval()

    def keep(self) -> None:
        self.kept = [*self.kept[-3:], copy.deepcopy(self.net.state_dict())]

    def load(self) -> None:
        self.net.load_state_dict(random.choice(self.kept))

    def load_assign(self) -> None:
        self.net.load_state_dict(copy.deepcopy(random.choice(self.kept)), assign=True)
        self.optimizer = self.new_optimizer()

    def deep_copy(self) -> None:
        self.net = copy.deepcopy(self.net)
        self.optimizer = self.new_optimizer()

    def saved_and_loaded(self) -> None:
        buffer = io.BytesIO()
        torch.save(self.net, buffer)
        buffer.seek(0)
        self.net = torch.load(buffer, weights_only=False)
        self.optimizer = self.new_optimizer()

    def to_and_back(self) -> None:
        self.net.to(random.choice([torch.float64, torch.bfloat16])).to(torch.float32)

    def to_layout(self) -> None:
        self.net.to(memory_format=random.choice([torch.channels_last, torch.contiguous_format]))

    def ema(self) -> None:
        with torch.no_grad():
            for p in self.net.parameters():
                p.lerp_(torch.zeros_like(p), 0.01)

    def switch(self) -> None:
        with mnv4_ops.enable(self.net):
            self.evaluate()

    def evaluate(self) -> None:
        with torch.no_grad() if random.random() < 0.5 else torch.inference_mode():
            got = self.net(self.x)
        want = original(self.net, self.x)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_thousand_random_interleavings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded; every evaluation against the original forward of the same weights."""
    monkeypatch.setattr(patch, "_forget_compiled", lambda: None)  # of other tests, slow
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stress = Stress()
    changes: list[Callable[[], None]] = [
        stress.step, stress.step, stress.train_forward, stress.keep, stress.load, stress.load_assign,
        stress.deep_copy, stress.saved_and_loaded, stress.to_and_back, stress.to_layout, stress.ema, stress.switch,
    ]  # fmt: skip
    mnv4_ops.enable()
    for _ in range(1000):
        random.choice(changes)()
        if random.random() < 0.7:
            stress.evaluate()
    with torch.no_grad():
        assert len(mnv4_ops.explain(stress.net, stress.x).served) == 2
    torch.set_num_threads(threads)
