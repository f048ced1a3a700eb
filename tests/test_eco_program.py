"""`torch.ops.mnv4.program`, the op of compiled models: schema, values, what it follows, what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import CASES
from torch import Tensor

import mnv4_ops
from mnv4_ops import _native, cache
from mnv4_ops.ops import program

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
PARTS = ("conv_bn_act", "uib", "head")


def chain() -> tuple[Tensor, list[Tensor], list[float], str, Callable[[Tensor], Tensor]]:
    """A 3x3, a block and a head back to back, and the same as separate ops."""
    torch.manual_seed(3)
    x, steps, params, eps, calls = torch.randn(2, 6, 9, 7), [], [], [], []
    channels = 6
    for op in PARTS:
        own, numbers, args = fitting(op, channels)
        steps.append((op, own, args))
        params += [p for p in own if p is not None]
        eps += numbers
        calls.append((op, own, numbers, args))
        channels = 16

    def separately(x: Tensor) -> Tensor:
        for op, own, numbers, args in calls:
            x = getattr(torch.ops.mnv4, op)(x, own, numbers, *args)
        return x

    return x, params, eps, program.recipe_of(steps), separately


def stage(c_out: int, *shape: int) -> list[Tensor | None]:
    w = torch.randn(c_out, *shape) * 0.3
    return [w, None, torch.rand(c_out) + 0.5, torch.randn(c_out), torch.randn(c_out), torch.rand(c_out) + 0.5]


def fitting(op: str, c: int) -> tuple[list[Tensor | None], list[float], list[Any]]:
    absent: list[Tensor | None] = [None] * 6
    if op == "conv_bn_act":
        return stage(16, c, 3, 3), [1e-3], [2, "symmetric", "relu"]
    if op == "uib":
        params = stage(c, 1, 3, 3) + stage(32, c, 1, 1) + absent + stage(16, 32, 1, 1) + [torch.rand(16)]
        return params, [1e-5, 1e-5, 0.0, 1e-5], [1, "symmetric", "relu", True]
    linear = [torch.randn(5, 24), torch.randn(5), *absent[2:]]
    return stage(20, c, 1, 1) + stage(24, 20, 1, 1) + linear, [1e-5, 1e-5, 0.0], ["relu"]


def test_the_cases_are_ops_of_the_library() -> None:
    assert set(PARTS) <= set(CASES)


def test_opcheck() -> None:
    x, params, eps, recipe, _ = chain()
    torch.library.opcheck(torch.ops.mnv4.program.default, (x, params, eps, recipe))


def test_it_is_its_ops_one_after_the_other(tier: str) -> None:
    x, params, eps, recipe, separately = chain()
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:1], x[:0], x[:, :, ::2, 1:]):
        got = torch.ops.mnv4.program(given, params, eps, recipe)
        torch.testing.assert_close(got, separately(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["in place", "statistics", "repack"])
def test_it_follows_its_parameters(change: str) -> None:
    x, params, eps, recipe, separately = chain()
    first = torch.ops.mnv4.program(x, params, eps, recipe)
    if change == "in place":
        params[0].mul_(1.5)
    elif change == "statistics":
        with torch.no_grad():
            torch.nn.functional.batch_norm(torch.randn(4, 16, 3, 3), params[3], params[4], training=True)
    else:
        params[0].data.mul_(1.5)
        mnv4_ops.repack()
    got = torch.ops.mnv4.program(x, params, eps, recipe)
    assert not torch.equal(got, first)
    torch.testing.assert_close(got, separately(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_dead_parameters() -> None:
    cache.drop()
    gc.collect()
    before = len(program._programs)
    x, params, eps, recipe, separately = chain()
    torch.ops.mnv4.program(x, params, eps, recipe)
    assert len(program._programs) == before + 1
    del params, separately
    gc.collect()
    assert len(program._programs) == before
    assert cache.stats()["raw_entries"] == 0


BAD: dict[str, tuple[Callable[..., tuple[Any, ...]], str]] = {
    "a parameter missing": (lambda x, p, e, r: (x, p[:-1], e, r), r"params to hold the \d+ tensors"),
    "a number missing": (lambda x, p, e, r: (x, p, e[:-1], r), r"eps to hold \d+ numbers"),
    "no JSON": (lambda x, p, e, r: (x, p, e, "["), "recipe to be a JSON list"),
    "empty": (lambda x, p, e, r: (x, [], [], "[]"), "at least one op"),
    "another op": (lambda x, p, e, r: (x, p, e, r.replace("uib", "xyz")), "op 1 of recipe to be one of"),
    "too few arguments": (lambda x, p, e, r: (x, p, e, r.replace(",true]", "]")), "the arguments of mnv4::uib"),
    "no flags": (lambda x, p, e, r: (x, p, e, r.replace("101111", "10x111", 1)), "a 0 or 1"),
    "channels of x": (lambda x, p, e, r: (x[:, :5], p, e, r), "x"),
    "dimensions of x": (lambda x, p, e, r: (x[0], p, e, r), "4 dimensions"),
    "dtype of x": (lambda x, p, e, r: (x.double(), p, e, r), "x of dtype float32"),
    "head first": (lambda x, p, e, r: (x, p, e, head_first(r)), "head to be the last op"),
}


def head_first(recipe: str) -> str:
    import json

    return json.dumps(json.loads(recipe)[::-1])


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_bad_input_names_argument_value_and_expectation(case: str, warm: bool) -> None:
    change, words = BAD[case]
    x, params, eps, recipe, _ = chain()
    if warm:
        torch.ops.mnv4.program(x, params, eps, recipe)
    with pytest.raises(ValueError, match=words):
        torch.ops.mnv4.program(*change(x, params, eps, recipe))


def test_backward_says_that_there_is_none() -> None:
    x, params, eps, recipe, _ = chain()
    out = torch.ops.mnv4.program(x.requires_grad_(), params, eps, recipe)
    with pytest.raises(RuntimeError, match="for inference only"):
        out.sum().backward()
