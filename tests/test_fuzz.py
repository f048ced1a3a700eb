"""Fuzzing of what takes text, bytes or shapes: refused with a ValueError, or right; never another error or a crash.

    MNV4_OPS_FUZZ=20000 pytest tests/test_fuzz.py tests/test_kernels_geometry.py

runs so many examples of each test; without it a few beside the corpus in `tests/corpus`, which always runs.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fuzz_helpers import corpus, fuzz
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import TestBlock, assert_2x, core, run
from test_kernels_geometry import descriptions
from test_kernels_interface import HEADER
from torch import Tensor

from mnv4_ops import (
    _native,
    ops,  # noqa: F401 - registers
)

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

EDITS = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=3)


@corpus("blobs")
@fuzz
@given(desc=descriptions(), edits=EDITS, cut=st.integers(-8, 8), seed=st.integers(0, 99))
def test_packed_weights_as_bytes(desc: dict[str, Any], edits: list[tuple[int, int]], cut: int, seed: int) -> None:
    """Bytes are set and the end is cut off or grows."""
    torch.manual_seed(seed)
    block = TestBlock.random(**desc).native()
    blob = bytearray(block.export_blob())
    before = bytes(blob)
    for offset, value in edits:
        blob[offset % len(blob)] = value
    changed = bytes(blob[:cut]) if cut < 0 else bytes(blob) + bytes(cut)
    twin = core().Block(**desc)
    try:
        twin.import_blob(changed)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "import_blob" in refusal
        assert changed[: HEADER.size] != before[: HEADER.size] or cut
        with pytest.raises(RuntimeError, match="not packed"):
            twin.export_blob()
        return
    # what a header says of the file is checked; the weights may be any
    assert cut == 0
    assert twin.export_blob()[HEADER.size :] == changed[HEADER.size :]
    x = torch.randn(1, desc["c_in"], 5, 4)
    out = run(twin, x)
    if changed == before:
        assert torch.equal(out, run(block, x))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 1e30, 1.5]),
    st.sampled_from(["", "relu", "RELU", "same", "symmetric", "1" * 6, "0" * 6, "head", "uib", "conv_bn_act", "x"]),
    st.just([]), st.just({}),
)  # fmt: skip
SPOTS = st.lists(st.tuples(st.integers(0, 40), JUNK), max_size=2)


def put(steps: Any, at: int, value: Any) -> Any:
    """Replaces one of the values inside, counted in the order of the text."""
    count = -1

    def walk(found: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            return value
        return [walk(v) for v in found] if isinstance(found, list) else found

    return walk(steps)


@corpus("recipes")
@fuzz
@given(spots=SPOTS, cut=st.integers(0, 5), size=st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)))
def test_recipes_of_programs(spots: list[tuple[int, Any]], cut: int, size: tuple[int, int, int]) -> None:
    """A recipe of two convolutions and a head with other values at some places, or with an end cut off."""
    generator = torch.Generator().manual_seed(1)
    first, second, linear = (torch.randn(shape, generator=generator) for shape in ((8, 3, 3, 3), (5, 8, 1, 1), (4, 5)))
    steps: Any = [
        ["conv_bn_act", "100000", [2, "symmetric", "relu"]],
        ["pointwise", "100000", ["none", False]],
        ["head", "000000000000100000", ["relu"]],
    ]
    for at, value in spots:
        steps = put(steps, at, value)
    text = json.dumps(steps, separators=(",", ":"))
    text = text[: len(text) - cut]
    n, h, w = size
    x = torch.randn(n, 3, h, w, generator=generator)

    def plain(x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x, first.to(x.dtype), stride=2, padding=1).relu()
        y = torch.nn.functional.conv2d(y, second.to(x.dtype))
        return y.mean((2, 3)) @ linear.to(x.dtype).T

    try:
        out = torch.ops.mnv4.program(x, [first, second, linear], [0.0] * 5, text)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "mnv4::" in refusal
        assert spots or cut or not (h and w)
    elif not spots and n:
        assert_2x(out, plain(x), plain(x.double()), more(plain))


def more(plain: Any) -> tuple[Tensor, Tensor]:
    """Plain torch on many images: its largest error on few values is luck."""
    y = torch.randn(512, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    return plain(y), plain(y.double())


CHANGES = st.sampled_from(
    ["none", "more", "less", "empty", "flat", "double", "bfloat16", "other", "strided", "meta", "grad"]
)


def changed(t: Tensor, how: str) -> Tensor | None:
    """A parameter that is not what is expected, or is in other strides."""
    if how == "none":
        return None
    if how in ("more", "less"):
        return torch.randn([max(0, t.shape[0] + (1 if how == "more" else -1)), *t.shape[1:]])
    if how == "empty":
        return t[:0]
    if how == "flat":
        return t.flatten()
    if how in ("double", "bfloat16"):
        return t.to(getattr(torch, "float64" if how == "double" else how))
    if how == "other":
        return t.new_ones([n + 2 if i >= 2 else n for i, n in enumerate(t.shape)])
    if how == "strided":
        return torch.stack([t, t * 2], -1)[..., 0]
    if how == "meta":
        return t.to("meta")
    return t.clone().requires_grad_()


@corpus("arguments")
@fuzz
@given(
    changes=st.lists(st.tuples(st.integers(0, 24), CHANGES), max_size=2),
    stride=st.sampled_from([1, 1, 1, 2, 0, 3, -1]),
    padding=st.sampled_from(["symmetric", "symmetric", "same", "valid", ""]),
    act=st.sampled_from(["relu", "gelu", "none", "silu"]),
    residual=st.booleans(),
    size=st.tuples(st.integers(0, 2), st.integers(7, 9), st.integers(0, 6), st.integers(0, 6)),
)
def test_arguments_of_an_op(
    changes: list[tuple[int, str]], stride: int, padding: str, act: str, residual: bool, size: tuple[int, ...]
) -> None:
    """`mnv4::uib` with an ExtraDW block of 8 channels whose parameters are changed at some places."""
    torch.manual_seed(0)
    block = TestBlock.random(
        c_in=8, c_mid=20, c_out=8, expand=True, expand_act="relu", project=True, start_kernel=3, mid_kernel=3,
    )  # fmt: skip
    params: list[Any] = []
    for layer in block.layers.values():
        params += [layer.weight, layer.bias, *layer.bn[:4]]
    params.append(torch.rand(8))
    given_params = list(params)
    for at, how in changes:
        t = given_params[at]
        given_params[at] = None if t is None else changed(t, how)
    x = torch.randn(size)
    try:
        out = torch.ops.mnv4.uib(x, given_params, [1e-3] * 4, stride, padding, act, residual)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "mnv4::uib" in refusal
        return
    n, c, h, w = size
    assert c == 8
    assert out.shape == (n, 8, -(-h // stride), -(-w // stride))
    if out.device.type == "cpu":
        assert out.isfinite().all()
