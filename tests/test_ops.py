"""torch.ops.mnv4.*: opcheck, values, layouts, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnv4_ops import _native, cache, ops

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")


def stage(c_out: int, c_in: int, kernel: int = 1, bias: bool = False, bn: bool = True) -> list[Tensor | None]:
    weight = torch.randn(c_out, c_in, kernel, kernel) / (c_in * kernel * kernel) ** 0.5
    norm: list[Tensor | None] = [None] * 4
    if bn:
        norm = [torch.rand(c_out) + 0.5, torch.randn(c_out) * 0.2, torch.randn(c_out) * 0.1, torch.rand(c_out) + 0.5]
    return [weight, torch.randn(c_out) * 0.1 if bias else None, *norm]


ABSENT: list[Tensor | None] = [None] * 6


def apply(x: Tensor, params: list[Tensor | None], eps: float, stride: int = 1, act: str = "none") -> Tensor:
    weight, bias, bn_weight, bn_bias, mean, var = params
    if weight is None:
        return x
    groups = x.shape[1] // weight.shape[1]
    x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)
    if mean is not None:
        x = F.batch_norm(x, mean, var, bn_weight, bn_bias, eps=eps)
    return {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}[act](x)


def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def head_params(c: int) -> list[Tensor | None]:
    classifier = [torch.randn(7, 24) / 5, torch.randn(7), None, None, None, None]
    return [*stage(20, c), *stage(24, 20), *classifier]


# op -> (input channels, params, eps, further arguments)
CASES: dict[str, Any] = {
    "uib": lambda: (
        16,
        [*stage(16, 1, 3), *stage(40, 16), *stage(40, 1, 5), *stage(16, 40), torch.rand(16)],
        [1e-5, 1e-3, 1e-5, 1e-4],
        (1, "symmetric", "relu", True),
    ),
    "fused_ib": lambda: (3, [*stage(20, 3, 3), *stage(9, 20), None], [1e-5, 1e-5], (2, "symmetric", "gelu", False)),
    "conv_bn_act": lambda: (3, stage(10, 3, 3, bias=True), [1e-3], (2, "symmetric", "relu6")),
    "pointwise": lambda: (18, stage(18, 18), [1e-5], ("relu", True)),
    "depthwise": lambda: (17, stage(17, 1, 5), [1e-5], (2, "symmetric", "none")),
    "depthwise_pointwise": lambda: (
        17,
        [*stage(17, 1, 3), *stage(33, 17, bn=False)],
        [1e-5, 0.0],
        (1, "symmetric", "relu", "none", False),
    ),
    "head": lambda: (12, head_params(12), [1e-5, 1e-5, 0.0], ("relu",)),
    "mobile_mqa": lambda: (20, *mqa_params(20, 3, 16, 24, 2, 1), (3, 2, 1, "symmetric", True)),
}


def mqa_params(c: int, heads: int, key_dim: int, value_dim: int, kv_stride: int, query_stride: int) -> Any:
    """Stages of mobile_mqa and their eps."""
    down = kv_stride > 1
    params = [
        *[None, None, *stage(c, 1)[2:]],
        *([None, None, *stage(c, 1)[2:]] if query_stride > 1 else ABSENT),
        *stage(heads * key_dim, c, bn=False),
        *(stage(c, 1, 3) if down else ABSENT),
        *stage(key_dim, c, bn=False),
        *(stage(c, 1, 3) if down else ABSENT),
        *stage(value_dim, c, bn=False, bias=True),
        *stage(c, heads * value_dim, bn=False),
        torch.rand(c) + 0.2,
    ]
    return params, [1e-3, 1e-5, 0.0, 1e-4, 0.0, 1e-5, 0.0, 0.0]


def expected_mqa(x: Tensor, params: list[Any], eps: list[float], args: tuple[Any, ...]) -> Tensor:
    heads, kv_stride, query_stride, _, residual = args
    s = [params[i : i + 6] for i in range(0, 48, 6)]

    def norm(x: Tensor, i: int) -> Tensor:
        return F.batch_norm(x, s[i][4], s[i][5], s[i][2], s[i][3], eps=eps[i])

    y = norm(x, 0)
    q = norm(F.avg_pool2d(y, 2), 1) if query_stride > 1 else y
    q = apply(q, s[2], 0.0)
    k, v = (apply(apply(y, s[i], eps[i], kv_stride), s[i + 1], 0.0) for i in (3, 5))
    n, _, h, w = q.shape
    q = q.reshape(n, heads, q.shape[1] // heads, h * w).transpose(2, 3)
    k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (k, v))
    out = torch.softmax(q @ k.transpose(2, 3) * k.shape[3] ** -0.5, -1) @ v
    y = out.transpose(2, 3).reshape(n, heads * v.shape[3], h, w)
    if query_stride > 1:
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
    y = apply(y, s[7], 0.0) * params[48].view(1, -1, 1, 1)
    return y + x if residual else y


def expected(op: str, x: Tensor, params: list[Any], eps: list[float], args: tuple[Any, ...]) -> Tensor:
    s = [params[i : i + 6] for i in range(0, len(params) // 6 * 6, 6)]
    if op == "uib":
        stride, _, act, residual = args
        y = apply(x, s[0], eps[0], 1 if s[2][0] is not None else stride)
        y = apply(apply(y, s[1], eps[1], act=act), s[2], eps[2], stride, act)
        y = apply(y, s[3], eps[3])
        y = y if params[24] is None else y * params[24].view(1, -1, 1, 1)
        return y + x if residual else y
    if op == "fused_ib":
        return apply(apply(x, s[0], eps[0], args[0], args[2]), s[1], eps[1])
    if op == "mobile_mqa":
        return expected_mqa(x, params, eps, args)
    if op in ("conv_bn_act", "depthwise"):
        return apply(x, s[0], eps[0], args[0], args[2])
    if op == "pointwise":
        return apply(x, s[0], eps[0], act=args[0]) + x
    if op == "depthwise_pointwise":
        return apply(apply(x, s[0], eps[0], args[0], args[2]), s[1], eps[1], act=args[3])
    y = apply(x, s[0], eps[0], act=args[0]).mean((2, 3), keepdim=True)
    y = apply(y, s[1], eps[1], act=args[0]).flatten(1)
    return F.linear(y, s[2][0], s[2][1])


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(ops.SCHEMAS)


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op: str) -> None:
    channels, params, eps, args = CASES[op]()
    overload = getattr(torch.ops.mnv4, op).default
    torch.library.opcheck(overload, (torch.randn(2, channels, 9, 8), params, eps, *args))
    x = torch.randn(1, channels, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
    # the fourth check, test_aot_dispatch_dynamic, would run backward
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(overload, (x, params, eps, *args), test_utils=utils)


@pytest.mark.parametrize("op", CASES)
def test_values(op: str, tier: str) -> None:
    channels, params, eps, args = CASES[op]()
    for n, h, w in ((2, 9, 8), (1, 1, 1), (3, 2, 13)):
        x = torch.randn(n, channels, h, w)
        double = [None if p is None else p.double() for p in params]
        want = expected(op, x.double(), double, eps, args)
        plain = expected(op, x, params, eps, args)
        got = getattr(torch.ops.mnv4, op)(x, params, eps, *args)
        limit = 2 * (plain - want).abs().max() + 2 * want.abs().max() * 2**-23
        assert (got - want).abs().max() <= limit


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 2)])
def test_same_padding(kernel: int, size: tuple[int, int]) -> None:
    params, x = stage(6, 1, kernel), torch.randn(1, 6, *size)
    weight, _, *norm = params
    want = F.conv2d(same_pad(x, kernel, 2), weight, stride=2, groups=6)
    want = F.batch_norm(want, norm[2], norm[3], norm[0], norm[1], eps=1e-3)
    got = torch.ops.mnv4.depthwise(x, params, [1e-3], 2, "same", "none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def layouts(x: Tensor) -> dict[str, Tensor]:
    n, c, h, w = x.shape
    wide = torch.randn(n, c, h, 2 * w)
    wide[..., ::2] = x
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., ::2],
        "flipped dims": x.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.cat([torch.zeros(1, c, h, w), x])[1:],
    }


@pytest.mark.parametrize("op", CASES)
def test_any_strides_in_canonical_channels_last_out(op: str) -> None:
    channels, params, eps, args = CASES[op]()
    x = torch.randn(2, channels, 5, 7)
    call = getattr(torch.ops.mnv4, op)
    want = call(x, params, eps, *args)
    for name, view in layouts(x).items():
        assert torch.equal(view, x)
        got = call(view, params, eps, *args)
        assert torch.equal(got, want), name
        if got.dim() == 4:
            _, c, h, w = got.shape
            assert got.stride() == (h * w * c, 1, w * c, c), name
    expanded = x[:, :, :1, :1].expand(2, channels, 5, 7)
    torch.testing.assert_close(call(expanded, params, eps, *args), call(expanded.clone(), params, eps, *args))


@pytest.mark.parametrize("shape", [(0, 5, 4), (1, 1, 1), (2, 1, 3), (1, 4, 1)])
@pytest.mark.parametrize("op", CASES)
def test_sizes_of_zero_and_one(op: str, shape: tuple[int, int, int]) -> None:
    channels, params, eps, args = CASES[op]()
    n, h, w = shape
    x = torch.randn(n, channels, h, w)
    call = getattr(torch.ops.mnv4, op)
    got, fake = call(x, params, eps, *args), call(x.to("meta"), to_meta(params), eps, *args)
    assert got.shape == fake.shape == expected(op, x, params, eps, args).shape
    assert got.stride() == fake.stride()
    assert not got.isnan().any()


def to_meta(params: list[Tensor | None]) -> list[Tensor | None]:
    return [None if p is None else p.to("meta") for p in params]


def test_backward_says_that_there_is_none() -> None:
    channels, params, eps, args = CASES["uib"]()
    out = torch.ops.mnv4.uib(torch.randn(1, channels, 4, 4, requires_grad=True), params, eps, *args)
    with pytest.raises(RuntimeError, match=r"mnv4::uib: expected no call of backward"):
        out.sum().backward()


def uib_call(**change: Any) -> Tensor:
    channels, params, eps, args = CASES["uib"]()
    given: dict[str, Any] = {"x": torch.randn(1, channels, 6, 6), "params": params, "eps": eps}
    given |= dict(zip(("stride", "padding", "act", "residual"), args, strict=True))
    for key, value in change.items():
        if key[1:].isdigit():
            given["params"][int(key[1:])] = value
        else:
            given[key] = value
    return torch.ops.mnv4.uib(*given.values())


BAD = {
    "rank": ({"x": torch.zeros(16, 6, 6)}, r"expected x with 4 dimensions .*got shape \(16, 6, 6\)"),
    "dtype": ({"x": torch.zeros(1, 16, 6, 6, dtype=torch.float64)}, r"expected x of dtype float32, got float64"),
    "half": ({"x": torch.zeros(1, 16, 6, 6).half()}, r"expected x of dtype float32, got float16"),
    "channels": ({"x": torch.zeros(1, 15, 6, 6)}, r"expected x with 16 channels, got 15"),
    "no rows": ({"x": torch.zeros(1, 16, 0, 6)}, r"at least one row and one column, got shape \(1, 16, 0, 6\)"),
    "device": ({"x": torch.zeros(1, 16, 6, 6, device="meta")}, r"expected params on meta like x, got cpu"),
    "stride": ({"stride": 3, "residual": False}, r"expected stride to be one of 1, 2, got 3"),
    "padding": ({"padding": "valid"}, r"expected padding to be one of symmetric, same, got 'valid'"),
    "act": ({"act": "swish"}, r"expected act to be one of none, relu, relu6, gelu, got 'swish'"),
    "residual": ({"stride": 2}, r"expected residual only with stride 1 .*got stride 2, 16 -> 16"),
    "too few": ({"params": [None] * 24}, r"expected params to hold 25 entries .*got 24"),
    "eps": ({"eps": [1e-5]}, r"expected eps to hold 4 numbers, one per stage, got 1"),
    "negative eps": ({"eps": [-1.0] * 4}, r"expected eps of .* to be at least 0, got -1.0"),
    "no expand": ({f"p{i}": None for i in range(6, 12)}, r"expected expand.weight to be a tensor, got None"),
    "bn without weight": ({"p0": None}, r"expected start.bn_weight to be None without start.weight"),
    "mean without var": ({"p5": None}, r"expected start.bn_mean and start.bn_var together"),
    "weight dtype": ({"p6": torch.zeros(40, 16, 1, 1).double()}, r"expand.weight of dtype float32, got float64"),
    "weight rank": ({"p6": torch.zeros(40, 16)}, r"expected expand.weight with 4 dimensions, got shape \(40, 16\)"),
    "kernel": ({"p6": torch.zeros(40, 16, 3, 3)}, r"kernel of expand.weight to be one of 1, got 3"),
    "kernel 7": ({"p0": torch.zeros(16, 1, 7, 7)}, r"kernel of start.weight to be one of 3, 5, got 7"),
    "oblong": ({"p0": torch.zeros(16, 1, 3, 5)}, r"expected start.weight with a square kernel"),
    "not depthwise": ({"p0": torch.zeros(16, 2, 3, 3)}, r"start.weight of a depthwise convolution.*got 2 per group"),
    "dw channels": ({"p12": torch.zeros(39, 1, 5, 5)}, r"mid.bn_weight with 39 elements, got 40"),
    "project": ({"p18": torch.zeros(16, 41, 1, 1)}, r"expected project.weight with 40 input channels, got 41"),
    "bn size": ({"p8": torch.zeros(39)}, r"expected expand.bn_weight with 40 elements, got 39"),
    "gamma": ({"p24": torch.zeros(15)}, r"expected gamma with 16 elements, got 15"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_expectation(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=r"^mnv4::uib: expected .*") as error:
        uib_call(**change)
    assert error.match(message)


def test_raw_cache_sees_statistics_that_a_train_mode_forward_moves() -> None:
    channels, params, eps, args = CASES["conv_bn_act"]()
    x = torch.randn(1, channels, 5, 5)
    torch.ops.mnv4.conv_bn_act(x, params, eps, *args)
    versions = params[4]._version, params[5]._version
    F.batch_norm(torch.randn(4, 10, 3, 3) * 3, params[4], params[5], params[2], params[3], training=True)
    # the reason why versions are not enough
    assert versions == (params[4]._version, params[5]._version)
    got = torch.ops.mnv4.conv_bn_act(x, params, eps, *args)
    torch.testing.assert_close(got, expected("conv_bn_act", x, params, eps, args), rtol=1e-5, atol=1e-5)


def test_raw_cache_follows_the_weights_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    channels, params, eps, args = CASES["conv_bn_act"]()
    x = torch.randn(1, channels, 5, 5)
    before = cache.stats()["raw_entries"]
    first = torch.ops.mnv4.conv_bn_act(x, params, eps, *args)
    assert cache.stats()["raw_entries"] == before + 1
    params[0].mul_(2)
    second = torch.ops.mnv4.conv_bn_act(x, params, eps, *args)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, expected("conv_bn_act", x, params, eps, args), rtol=1e-5, atol=1e-5)
    assert cache.stats()["raw_entries"] == before + 1
    monkeypatch.setattr(cache, "RAW_ENTRIES", 4)
    keep = [CASES["pointwise"]() for _ in range(8)]
    for c, p, e, a in keep:
        torch.ops.mnv4.pointwise(torch.randn(1, c, 2, 2), p, e, *a)
    assert cache.stats()["raw_entries"] <= 4
    del keep, params, p
    cache.drop()
    assert cache.stats()["raw_bytes"] == 0
