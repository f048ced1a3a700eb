"""Any channels, sizes, strides, stages, batch and threads, by the 2x rule on NaN-poisoned outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fuzz_helpers import corpus, fuzz
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_helpers import NAN, TestBlock, assert_2x, core, ib, random_layer, run
from torch import Tensor

from mnv4_ops import _native
from mnv4_ops.check import native_block
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import ACTS, PADDINGS, HeadSpec

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

LAYOUTS = ("nchw", "channels_last", "sliced", "sliced_channels", "expanded", "transposed", "nhcw")
# elements that show torch's largest error: among thousands of examples, a maximum over a few hundred is luck
SAMPLE = 1 << 12
CHANNELS = st.integers(1, 70)
SIDES = st.integers(1, 20)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides; memory beside the image is NaN."""
    n, c, h, w = x.shape
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        view = torch.full((n, c, h + 2, 3 * w + 1), NAN)[:, :, 1 : h + 1, 1 : 3 * w + 1 : 3]
        return view.copy_(x)
    if layout == "sliced_channels":
        view = torch.full((n, h, w + 1, c + 3), NAN).permute(0, 3, 1, 2)[:, 2 : c + 2, :, :w]
        return view.copy_(x)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "nhcw":
        return x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    return x


def image(n: int, c: int, h: int, w: int, layout: str, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if layout == "expanded":
        # stride 0 in one dimension
        dim = seed % 4
        shape = [1 if i == dim else size for i, size in enumerate((n, c, h, w))]
        return torch.randn(shape, generator=generator).mul_(2).add_(mean).expand(n, c, h, w)
    return laid_out(torch.randn(n, c, h, w, generator=generator).mul_(2).add_(mean), layout)


def alike(x: Tensor, images: int, seed: int, mean: float = 0.0) -> Tensor:
    """Other images that are constant where `x` is: rounding errors of equal values do not average out."""
    shape = [images, *(1 if x.stride(i) == 0 else x.shape[i] for i in (1, 2, 3))]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(2).add_(mean).expand(images, *x.shape[1:])


def independents(truth: Tensor, channels: int) -> int:
    """How many errors of an output are independent, at least 1; `channels`: of the narrowest layer."""
    return max(1, int(truth.numel() * min(1.0, channels / truth.shape[1])))


def enough(images: int, independent: int) -> int:
    """How many images hold `SAMPLE` independent errors where `images` have so many, up to 256."""
    return min(SAMPLE * images // independent + 1, 256)


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, Any]:
    """Every combination of stages that `_core.Block` takes."""
    d: dict[str, Any] = {"padding": draw(st.sampled_from(PADDINGS))}
    start = draw(st.sampled_from((0, 3, 5)))
    expand, project = draw(st.booleans()), draw(st.booleans())
    assume(start or expand or project)
    mid = draw(st.sampled_from((0, 3, 5))) if expand and project else 0
    acts, strides = st.sampled_from(ACTS), st.sampled_from((1, 2))
    d["c_in"] = draw(CHANNELS)
    d["c_mid"] = draw(CHANNELS) if expand else d["c_in"]
    d["c_out"] = draw(st.one_of(st.just(d["c_in"]), CHANNELS)) if project else d["c_mid"]
    if start:
        d |= {"start_kernel": start, "start_stride": draw(strides), "start_act": draw(acts)}
    if expand:
        kernel = 1 if start or mid else draw(st.sampled_from((1, 3, 5)))
        stride = draw(strides) if kernel > 1 else 1
        d |= {"expand": True, "expand_kernel": kernel, "expand_stride": stride, "expand_act": draw(acts)}
    if mid:
        d |= {"mid_kernel": mid, "mid_stride": draw(strides), "mid_act": draw(acts)}
    if project:
        d |= {"project": True, "project_act": draw(acts)}
    flat = all(d.get(f"{stage}_stride", 1) == 1 for stage in ("start", "expand", "mid"))
    # a lone depthwise has a test of its own
    if flat and d["c_in"] == d["c_out"] and (expand or project):
        d["residual"] = draw(st.booleans())
    return d


def judge_block(block: TestBlock, x: Tensor, output: Tensor, seed: int) -> None:
    """By the 2x rule, torch's largest error taken over at least `SAMPLE` independent ones, which are judged too."""
    truth, plain = block.reference(x.double()), block.reference(x)
    more, independent = None, 0
    if x.shape[0] > 0:
        narrowest = min(block.desc["c_mid"], block.desc["c_out"])
        independent = independents(truth, narrowest)
        images = enough(x.shape[0], independent)
        if images > x.shape[0]:
            y = alike(x, images, seed + 1)
            more = block.reference(y), block.reference(y.double())
            assert_2x(run(block.native(), y), *more, independent=independents(more[1], narrowest))
    assert_2x(output, plain, truth, more, independent)


@corpus("blocks")
@fuzz
@given(
    desc=descriptions(),
    size=st.tuples(st.integers(0, 4), SIDES, SIDES),
    layout=st.sampled_from(LAYOUTS),
    bn=st.booleans(),
    bias=st.booleans(),
    gamma=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_blocks(
    tier: str, desc: dict[str, Any], size: tuple[int, int, int], layout: str, bn: bool, bias: bool, gamma: bool,
    threads: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    block = TestBlock.random(bn=bn, bias=bias, gamma=gamma and bool(desc.get("project")), **desc)
    n, h, w = size
    x = image(n, desc["c_in"], h, w, layout, seed)
    native = block.native()
    output = run(native, x, threads)
    assert native.output_shape(n, h, w) == tuple(block.reference(x).shape)
    judge_block(block, x, output, seed)


@fuzz
@given(
    widths=st.tuples(CHANNELS, *[st.one_of(st.just(0), CHANNELS)] * 3),
    act=st.sampled_from(ACTS),
    # more images than are pooled at once (16)
    size=st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(1, 40)),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_heads(
    tier: str, widths: tuple[int, int, int, int], act: str, size: tuple[int, int, int], layout: str, threads: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    c_in, c_feat, c_hidden, classes = widths
    spec = HeadSpec(c_in, c_feat, c_hidden, classes, act)
    wide = c_feat or c_in
    feat = random_layer(c_feat, c_in, 1) if c_feat else None
    hidden = random_layer(c_hidden, wide, 1) if c_hidden else None
    linear = random_layer(classes, c_hidden or wide, 1, bn=False, bias=True) if classes else None
    if linear is not None:
        linear = linear._replace(weight=linear.weight.flatten(1))
    params = R.HeadParams(feat, hidden, linear)
    n, h, w = size
    # not centred, as behind a ReLU: what is pooled is of unit size
    x = image(n, c_in, h, w, layout, seed, mean=1)
    output = run(native_block(spec, params), x, threads)
    if n == 0:
        assert output.shape == (0, spec.features)
        return
    exact = R.cast(params, torch.float64)
    y = alike(x, 64, seed + 1, mean=1)
    more = R.run(y, spec, params), R.run(y.double(), spec, exact)
    assert_2x(output, R.run(x, spec, params), R.run(x.double(), spec, exact), more)


@fuzz
@given(
    descs=st.lists(descriptions(), min_size=2, max_size=4),
    classes=st.integers(0, 40),
    size=st.tuples(st.integers(0, 4), SIDES, SIDES),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_programs(
    tier: str, descs: list[dict[str, Any]], classes: int, size: tuple[int, int, int], layout: str, threads: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    blocks: list[TestBlock] = []
    c = descs[0]["c_in"]
    for desc in descs:
        desc = dict(desc)
        # the channels of the block before
        if not desc.get("expand"):
            desc["c_mid"] = c
        if not desc.get("project"):
            desc["c_out"] = desc["c_mid"]
        desc["c_in"] = c
        if desc["c_out"] != c:
            desc["residual"] = False
        blocks.append(TestBlock.random(**desc))
        c = desc["c_out"]
    ops = [block.native() for block in blocks]
    linear = random_layer(classes, c, 1, bn=False, bias=True) if classes else None
    if linear is not None:
        linear = linear._replace(weight=linear.weight.flatten(1))
        ops.append(native_block(HeadSpec(c, 0, 0, classes), R.HeadParams(None, None, linear)))

    def reference(y: Tensor) -> Tensor:
        for block in blocks:
            y = block.reference(y)
        if linear is None:
            return y
        return R.head(y, HeadSpec(c, 0, 0, classes), R.HeadParams(None, None, R.cast(linear, y.dtype)))

    n, h, w = size
    x = image(n, descs[0]["c_in"], h, w, layout, seed)
    output = run(core().Program(ops), x, threads)
    if n == 0:
        assert output.numel() == 0
        return
    truth = reference(x.double())
    independent = independents(truth, min(block.desc[name] for block in blocks for name in ("c_mid", "c_out")))
    y = alike(x, enough(n, independent), seed + 1)
    assert_2x(output, reference(x), truth, (reference(y), reference(y.double())), independent)


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 2), (3, 2), (5, 2)])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_a_pair_in_bands_at_any_place_of_a_program(before: int, batch: int, threads: int, tier: str) -> None:
    """Two blocks whose image between them does not fit into L2 run in bands of rows, whatever is around them."""
    # above half of L2, where bands begin
    side = math.isqrt(core().cpu_info()["l2"] // 4 // 2 // 16) + 5
    blocks = [TestBlock.random(c_in=8, c_mid=8, c_out=8, expand=True) for _ in range(before + 3)]
    wide = {"c_in": 8, "c_mid": 24, "c_out": 24, "expand": True, "expand_kernel": 3, "expand_stride": 2}
    blocks[before + 1] = TestBlock.random(**wide)
    blocks[before + 2] = TestBlock.random(**ib(24, 24, 8))
    x = torch.randn(batch, 8, side, side)
    truth, plain = x.double(), x
    for block in blocks:
        truth, plain = block.reference(truth), block.reference(plain)
    assert_2x(run(core().Program([block.native() for block in blocks]), x, threads), plain, truth)


@pytest.mark.parametrize("flat", [(3,), (2, 3)], ids=["rows", "images"])
@pytest.mark.parametrize("size", [(7, 7), (7, 22), (12, 40)])
def test_heads_on_flat_images(size: tuple[int, int], flat: tuple[int, ...], tier: str) -> None:
    """A long sum of equal values rounds in one direction at each step: pooling has to be in short chains."""
    spec = HeadSpec(12, 8, 0, 0, "none")
    params = R.HeadParams(random_layer(8, 12, 1), None, None)
    shape = [256, 12, *(1 if i in flat else side for i, side in ((2, size[0]), (3, size[1])))]
    x = torch.randn(shape).mul_(2).add_(1).expand(256, 12, *size)
    truth = R.run(x.double(), spec, R.cast(params, torch.float64))
    assert_2x(run(native_block(spec, params), x), R.run(x, spec, params), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout: str, tier: str) -> None:
    """The values alone decide: whatever the strides of the input, the same output."""
    for desc in ({"expand": True}, {"start_kernel": 3, "expand": True}, {"expand": True, "expand_kernel": 3}):
        block = TestBlock.random(c_in=21, c_mid=34, c_out=21, project=True, residual=True, **desc).native()
        x = torch.randn(3, 21, 9, 11)
        if layout == "expanded":
            x = x[:, :, :1].expand(3, 21, 9, 11)
        view = x if layout == "expanded" else laid_out(x, layout)
        torch.testing.assert_close(run(block, view), run(block, x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 33, 70])
def test_channels_around_the_unit_on_one_pixel(channels: int, tier: str) -> None:
    for desc in ({"mid_kernel": 5}, {"start_kernel": 5, "mid_kernel": 3}, {}):
        block = TestBlock.random(c_in=channels, c_mid=channels, c_out=channels, expand=True, project=True, **desc)
        for n, h, w in ((1, 1, 1), (2, 1, 3), (1, 4, 1)):
            x = torch.randn(n, channels, h, w)
            judge_block(block, x, run(block.native(), x), 1)


def test_sums_longer_than_a_block_and_wide_rows(tier: str) -> None:
    """More terms than one block of a sum, a row that exceeds the scratch, and bands that end in the middle of one."""
    for desc, shape in (
        ({"c_in": 401, "c_mid": 777, "c_out": 401, "residual": True}, (1, 401, 5, 3)),
        ({"c_in": 5, "c_mid": 300, "c_out": 6, "mid_kernel": 5, "mid_stride": 2}, (1, 5, 3, 700)),
        ({"c_in": 5, "c_mid": 900, "c_out": 5, "start_kernel": 3, "mid_kernel": 3, "residual": True}, (1, 5, 67, 33)),
        ({"c_in": 70, "c_mid": 33, "c_out": 7, "expand_kernel": 5, "expand_stride": 2}, (2, 70, 37, 300)),
    ):
        block = TestBlock.random(expand=True, expand_act="relu", project=True, **desc)
        x = torch.randn(shape)
        for threads in (1, 3):
            judge_block(block, x, run(block.native(), x, threads), 1)


@pytest.mark.parametrize("act", ACTS)
def test_a_lone_depthwise_adds_the_residual_or_refuses_it(act: str, tier: str) -> None:
    block = TestBlock.random(c_in=19, c_mid=19, c_out=19, start_kernel=3, start_act=act, residual=True)
    x = torch.randn(2, 19, 9, 8)
    try:
        native = block.native()
    except ValueError as error:
        message = str(error)
    else:
        judge_block(block, x, run(native, x), 1)
        return
    assert "residual" in message


@fuzz
@given(
    desc=descriptions(),
    size=st.tuples(st.integers(0, 2), SIDES, SIDES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
def test_ops_return_canonical_channels_last(
    desc: dict[str, Any], size: tuple[int, int, int], layout: str, seed: int
) -> None:
    """Through `torch.ops.mnv4.uib`, strides and all; the native block is the same as `_core.Block`'s."""
    from mnv4_ops import ops  # noqa: F401 - registers

    torch.manual_seed(seed)
    act = desc.get("expand_act", "relu")
    start, mid = desc.get("start_kernel", 0), desc.get("mid_kernel", 0)
    stride = 2 if (start or mid) and seed % 2 else 1
    c_in, c_mid, c_out = desc["c_in"], 23, desc["c_out"]
    block = TestBlock.random(
        c_in=c_in, c_mid=c_mid, c_out=c_out, padding=desc["padding"],
        start_kernel=start, start_stride=1 if mid or not start else stride,
        expand=True, expand_act=act, mid_kernel=mid, mid_stride=stride if mid else 1, mid_act=act if mid else "none",
        project=True,
    )  # fmt: skip
    params: list[Tensor | None] = []
    for stage in range(4):
        layer = block.layers.get(stage)
        params += [None] * 6 if layer is None else [layer.weight, layer.bias, *layer.bn[:4]]
    n, h, w = size
    x = image(n, c_in, h, w, layout, seed)
    with torch.no_grad():
        out = torch.ops.mnv4.uib(x, [*params, None], [1e-3] * 4, stride, desc["padding"], act, False)
    ho, wo = -(-h // stride), -(-w // stride)
    assert out.shape == (n, c_out, ho, wo)
    assert out.stride() == torch.empty((n, c_out, ho, wo), memory_format=torch.channels_last).stride()
    if n:
        torch.testing.assert_close(out, run(block.native(), x, torch.get_num_threads()), rtol=0, atol=0)
