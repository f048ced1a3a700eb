"""The tuner without a GPU: what it compares and what it takes, with times from a formula."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mnv4_ops.triton_kernels import config, tuner
from mnv4_ops.triton_kernels.plan import apart, spread
from triton_cases import ib

HEAD = {"c_in": 64, "c_feat": 96, "feat_act": "relu", "c_hidden": 128, "hidden_act": "relu", "classes": 10}
BLOCKS = {
    "ExtraDW": ib(160, 640, 160, start_kernel=3, mid_kernel=5, residual=True),
    "ExtraDW s2": ib(48, 192, 80, start_kernel=3, mid_kernel=5, mid_stride=2),
    "wide": ib(512, 2048, 512, start_kernel=5, mid_kernel=5, residual=True),
    "FFN": ib(160, 320, 160, residual=True),
    "ConvNext": ib(256, 1024, 256, start_kernel=3, residual=True),
    "FusedIB": ib(32, 128, 48, expand_kernel=3, expand_stride=2),
    "stem": {"c_in": 3, "c_mid": 32, "c_out": 32, "expand": True, "expand_kernel": 3, "expand_stride": 2},
    "head": HEAD,
}


class Timer:
    """In the place of tuner._Timed: a launch takes as long as `cost` says."""

    cost: Any = None
    wrong: Any = None
    planned = 0

    def __init__(self, runner: Any, n: int, h: int, w: int, tf32: bool) -> None:
        self.runner, self.size, self.tf32 = runner, (n, h, w), tf32

    def plan(self, choice: dict[str, Any]) -> list[dict[str, Any]]:
        type(self).planned += 1
        # the real plan has one launch per configuration and chunk of the batch
        assert len(self.runner.plan(*self.size, choice, self.tf32).launches) % len(choice["ops"]) == 0
        if self.wrong is not None and any(map(self.wrong, choice["ops"])):
            raise RuntimeError("WRONG")
        return choice["ops"]

    def time(self, launches: list[dict[str, Any]]) -> float:
        return sum(map(self.cost, launches))


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> type[Timer]:
    class Own(Timer):
        @staticmethod
        def cost(cfg: dict[str, Any]) -> float:
            return 1.0 + zlib.crc32(repr(sorted(cfg.items())).encode()) % 997

    monkeypatch.setattr(tuner, "_Timed", Own)
    monkeypatch.setattr(config, "device_limits", lambda index: (132, 232448))
    return Own


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_candidate_can_be_planned_and_the_best_is_taken(name: str, batch: int, timer: type[Timer]) -> None:
    for dtype in (torch.float16, torch.float32):
        runner = tuner.make(BLOCKS[name], dtype, "cpu")
        known: dict[str, float] = {}
        choice, micros = tuner.tune_block(runner, batch, 16, 16, known=known)
        assert micros == sum(map(timer.cost, choice["ops"]))
        exact = dtype == torch.float32
        for _, ops, lists in tuner._choices(runner, batch, 16, 16, exact, 132):
            # no kind of variant is better than what was taken
            assert len(lists) == len(ops) + (name == "head")
            assert micros <= sum(min(map(timer.cost, options)) for options in lists)


def test_known_times_are_not_taken_again(timer: type[Timer]) -> None:
    runner = tuner.make(BLOCKS["ExtraDW"], torch.float16, "cpu")
    known: dict[str, float] = {}
    first = tuner.tune_block(runner, 64, 16, 16, known=known)
    before, timer.planned = timer.planned, 0
    assert tuner.tune_block(runner, 64, 16, 16, known=known) == first
    assert timer.planned <= 3 < before
    jobs = [(BLOCKS["ExtraDW"], 16, 16)]
    tasks = tuner.tasks_for(jobs, torch.float16, [64], False, 132)
    left = tuner.tasks_for(jobs, torch.float16, [64], False, 132, known)
    assert len(left) <= 6 < len(tasks)


def test_a_wrong_candidate_is_never_taken(timer: type[Timer]) -> None:
    runner = tuner.make(BLOCKS["ExtraDW"], torch.float16, "cpu")
    known: dict[str, float] = {}
    choice, _ = tuner.tune_block(runner, 64, 16, 16, known=known)
    bad = choice["ops"][-1]
    timer.wrong = staticmethod(lambda cfg: cfg == bad)
    # the known time makes it the first to be tried
    again, _ = tuner.tune_block(runner, 64, 16, 16, known=known)
    assert bad not in again["ops"]
    timer.wrong = staticmethod(lambda cfg: True)
    with pytest.raises(RuntimeError, match="no candidate"):
        tuner.tune_block(runner, 64, 16, 16)


def test_one_operation_apart_and_the_other_not(timer: type[Timer]) -> None:
    """The first depthwise fast in one kernel, the second fast as a kernel of its own."""
    runner = tuner.make(BLOCKS["ExtraDW"], torch.float16, "cpu")
    first, second = (apart(op) for op in runner.ops)
    lists = dict.fromkeys(("one", "two"), 0)
    for _, ops, options in tuner._choices(runner, 64, 16, 16, False, 132):
        lists["two" if ops == (*first, *second) else "one"] = options
    fast = [lists["one"][0][0], lists["two"][2][0], lists["two"][3][0]]
    timer.cost = staticmethod(lambda cfg: 1.0 if cfg in fast else 10.0)
    choice, _ = tuner.tune_block(runner, 64, 16, 16)
    paths = [cfg["path"] for cfg in choice["ops"]]
    assert spread(runner.ops, paths) in ((runner.ops[0], *second), (*first, *second))
    assert paths[-2:] == ["depthwise", "pointwise"]


def test_a_table_for_fp16_serves_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnv4_ops import tuning

    half, bfloat = (tuner.make(BLOCKS["FFN"], dtype, "cpu") for dtype in (torch.float16, torch.bfloat16))
    entry = {"fused": False, "chunk": 0, "ops": [{"path": "pointwise"}] * 2}
    monkeypatch.setattr(tuning, "table", lambda name: {f"float16 {half.key}": {"8x16x16": entry}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    for runner in (half, bfloat):
        runner.device = torch.device("cuda", 0)
        monkeypatch.setattr(type(runner), "_sms", lambda self: 132)
        assert runner.choose(8, 16, 16) == entry
        assert runner.choose(8, 15, 17) == entry
        assert runner.choose(1, 2, 2) != entry
    other = tuner.make(ib(160, 320, 160, residual=True, act="gelu"), torch.float16, "cpu")
    other.device = torch.device("cuda", 0)
    assert other.key != half.key
    assert other.choose(8, 16, 16) == entry


def test_near_choices_are_the_formula_and_those_of_alike_blocks() -> None:
    half = tuner.make(BLOCKS["FFN"], torch.float16, "cpu")
    ops = [{"path": "pointwise", "k": 1}, {"path": "pointwise", "k": 2}]
    entries = {f"float16 {half.key}": {"8x16x16": {"fused": False, "chunk": 0, "ops": ops, "us": 1.0}}}
    gelu = tuner.make(ib(160, 320, 160, residual=True, act="gelu"), torch.bfloat16, "cpu")
    found = {"fused": False, "chunk": 0, "ops": ops}
    assert tuner.near_choices(half, 8, 16, 16, False, entries) == [half.by_formula(8, 16, 16, False), found]
    # bfloat16 takes what was the best in float16
    assert tuner.near_choices(gelu, 8, 16, 16, False, entries) == [found]
    assert tuner.near_choices(gelu, 8, 16, 16, False, {}) == [gelu.by_formula(8, 16, 16, False)]
    exact = tuner.near_choices(tuner.make(BLOCKS["FFN"], torch.float32, "cpu"), 8, 16, 16, False, entries)
    assert len(exact) == 2
    assert all(op["path"] == "pointwise" for choice in exact for op in choice["ops"])
