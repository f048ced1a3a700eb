"""Kernels in Gluon without a GPU, see `gluon_emulator`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

import gluon_emulator
from mnv4_ops.triton_kernels import MobileMQA, hopper, mqa_config
from test_triton_hopper import SMALL, WIDE, spec
from triton_cases import judge
from triton_mqa_cases import MQACase

from mnv4_ops.spec import MQASpec

DOWN = spec(kv_stride=2)
SHORT = spec(c=192, heads=3, key_dim=48, value_dim=40, kv_stride=2)


def result(case: MQACase, x: torch.Tensor, more: Any = None) -> torch.Tensor:
    """Of images [n, h, w, c], laid out as these; `more`: other entries of the choice by path."""
    block = case.build()
    choice = mqa_config.on_hopper(block, *x.shape[:3])
    assert choice is not None
    choice["ops"] = [{**cfg, **(more or {}).get(cfg["path"], {})} for cfg in choice["ops"]]
    plan = block.plan(*x.shape[:3], choice)
    out = torch.full_like(x, float("nan"))
    # bytes of 255 are NaN
    tensors = {"x": x.view(-1), "out": out.view(-1), "scratch": torch.full((plan.scratch,), 255, dtype=torch.uint8)}
    for launch in plan.launches:
        gluon_emulator.run(launch, tensors)
    return out


def fraction(case: MQACase, n: int, h: int, w: int, more: Any = None) -> float:
    """Of the allowed error."""
    x = torch.randn(n, h, w, case.spec.c).to(case.dtype)
    got, image = result(case, x, more).permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    return max(judge(got, case.reference(image, case.dtype), case.reference(image, torch.float64)))


@pytest.fixture(params=[False, True], ids=["copies at once", "copies late"])
def _late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "LATE", request.param)
    monkeypatch.setattr(hopper, "available", lambda: True)
    # a small device, on which a program has several tiles
    monkeypatch.setattr(MobileMQA, "_sms", lambda self: 6)


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("s", "n", "h", "w"),
    [
        (DOWN, 2, 16, 16),
        (spec(kv_stride=2, padding="same", residual=False), 2, 13, 9),
        (SHORT, 2, 23, 21),
        (spec(c=192, heads=1, key_dim=48, value_dim=48, kv_stride=2), 2, 11, 15),
        (SMALL, 3, 8, 8),
        (spec(c=256, heads=2, key_dim=40, value_dim=48), 3, 5, 6),
        (spec(c=96, heads=3, residual=False), 2, 8, 8),
        (WIDE, 3, 12, 12),
        (spec(c=320, heads=5), 3, 3, 7),
        (spec(c=376, heads=8, key_dim=40, value_dim=56, residual=False), 2, 10, 11),
    ],
    ids=str,
)
def test_block(s: MQASpec, n: int, h: int, w: int, dtype: torch.dtype) -> None:
    assert fraction(MQACase(s, dtype, "cpu"), n, h, w) <= 1


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize(
    ("s", "n", "h", "w", "more"),
    [
        (SMALL, 3, 7, 8, {"mqa_hopper": {"halves": 0}}),
        (spec(c=128, heads=6, residual=False), 2, 1, 3, {"mqa_hopper": {"halves": 1}}),
        (WIDE, 2, 12, 12, {"attention_hopper": {"turns": 4}}),
    ],
    ids=str,
)
def test_other_choices(s: MQASpec, n: int, h: int, w: int, more: Any) -> None:
    assert fraction(MQACase(s, torch.float16, "cpu"), n, h, w, more) <= 1


@pytest.mark.usefixtures("_late")
@pytest.mark.parametrize("s", [DOWN, SMALL, WIDE], ids=["down", "small", "wide"])
def test_infinite_pixels_stay_in_their_image(s: MQASpec) -> None:
    case = MQACase(s, torch.float16, "cpu")
    x = torch.randn(3, 8, 8, s.c).half()
    clean = result(case, x)
    x[1, 2, 3, 5] = float("inf")
    out = result(case, x)
    assert torch.equal(out[::2], clean[::2])
    assert out[1].isnan().any()
    assert case.reference(x.permute(0, 3, 1, 2), torch.float16)[1].isnan().any()


BEHIND = ("copy_out(wo_s0, wo_s1, desc_o0, desc_o1, i_h, o_bar, TWO)\n    b_s0, b_s1, b_m", "b_s0, b_s1, b_m")


@pytest.mark.parametrize(
    ("s", "late", "module", "edit"),
    [
        (DOWN, True, "mqa_hopper", ("        mbarrier.wait(q_bar, i_h & 1)\n", "")),
        (DOWN, True, "mqa_hopper", ("    mbarrier.wait(o_bar, phase & 1)\n", "")),
        (DOWN, False, "mqa_hopper", ("wait((1 + SHORT) * (1 + TWO), deps", "wait((1 + SHORT) * (1 + TWO) + 1, deps")),
        (
            SMALL,
            False,
            "mqa_hopper",
            ("    found = hopper", "    k_s0.store(gl.zeros(k_s0.shape, k_s0.dtype))\n    found = hopper"),
        ),
        (DOWN, False, "mqa_hopper", BEHIND),
        (WIDE, False, "pointwise_hopper", ("            if k <= PIECES:\n                tma.store_wait(0)\n", "")),
        (WIDE, False, "pointwise_hopper", ("wait(0, deps=[b_acc])", "wait(1, deps=[b_acc])")),
        (WIDE, True, "pointwise_hopper", ("        mbarrier.wait(y_bar, phase)\n", "")),
        (WIDE, True, "attention_hopper", ("        async_copy.wait_group(0)\n", "")),
    ],
)
def test_wrong_kernels_are_seen(
    s: MQASpec, late: bool, module: str, edit: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "available", lambda: True)
    monkeypatch.setattr(MobileMQA, "_sms", lambda self: 6)
    monkeypatch.setattr(gluon_emulator, "LATE", late)
    monkeypatch.setattr(gluon_emulator, "SECONDS", 1.0)
    monkeypatch.setattr(gluon_emulator, "_modules", {})
    monkeypatch.setattr(gluon_emulator, "EDITS", {module: edit})
    try:
        found = fraction(MQACase(s, torch.float16, "cpu"), 3, 8, 8)
    except AssertionError:
        return
    assert not found <= 1
